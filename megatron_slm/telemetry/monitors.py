"""The scalars of a run in CSV files, Weights & Biases and Comet, through DeepSpeed's monitors.

They are configured by the DeepSpeed JSON's own sections. DeepSpeed's engine does not see these: it would write names
and steps of its own, and again what a resumed run has written before.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
import uuid
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.monitor.monitor import MonitorMaster

from megatron_slm.errors import ConfigError, ServiceError

_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
WANDB_RUN_ID = "wandb_run_id"
"""File of a run's folder: what Weights & Biases calls the run, so that a resumed one is the same."""


def check_monitors(sections: Mapping[str, Any]) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: a field that DeepSpeed does not know or cannot read, or a package that is not installed.
    """
    for name, section in sections.items():
        try:
            parsed = getattr(DeepSpeedMonitorConfig(**{name: section}), name)
        except ValueError as error:
            fields = "; ".join(str(error).splitlines()[1:3])
            raise ConfigError(
                f"DeepSpeed JSON: {name}", section, f"has the fields of DeepSpeed's monitor ({fields})", "correct them"
            ) from error
        package = _PACKAGES.get(name)
        if parsed.enabled and package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"DeepSpeed JSON: {name}",
                section,
                f"needs the package {package}, which is not installed",
                f"pip install {package}, or set enabled to false",
            )


def board_folder(sections: Mapping[str, Any], run_dir: Path) -> Path:
    """Where TensorBoard's files go: where the section `tensorboard` says if enabled, else into the run's folder."""
    section = sections.get("tensorboard", {})
    if not section.get("enabled") or not section.get("output_path"):
        return run_dir / "tensorboard"
    return Path(section["output_path"]) / section.get("job_name", "tensorboard")


class Monitors:
    """CSV, Weights & Biases and Comet, as far as they are enabled; on one rank.

    Args:
        sections: of the DeepSpeed JSON.
        run_dir: the run's folder; CSV files go into its folder `csv` unless the section says where else.
        resume_step: the step that the run goes on from; 0 where it starts afresh.

    Raises:
        ServiceError: one of them cannot be opened.
    """

    def __init__(self, sections: Mapping[str, Any], run_dir: Path, *, resume_step: int) -> None:
        wanted = {name: section for name, section in sections.items() if name != "tensorboard"}
        self._master: MonitorMaster | None = None
        self._sections = {name: section for name, section in wanted.items() if section.get("enabled")}
        if not self._sections:
            return
        if wanted.get("csv_monitor", {}).get("enabled"):
            wanted["csv_monitor"] = {"output_path": str(run_dir), "job_name": "csv", **wanted["csv_monitor"]}
        if wanted.get("wandb", {}).get("enabled"):
            _name_wandb_run(run_dir, resume_step)
        config = DeepSpeedMonitorConfig(**wanted)
        folder = Path(config.csv_monitor.output_path, config.csv_monitor.job_name)
        known = _csv_history(folder, resume_step) if config.csv_monitor.enabled else []
        try:
            self._master = MonitorMaster(config)
        except Exception as error:  # whatever a service's client raises
            fix = "log in, set WANDB_MODE=offline, or set enabled to false"
            raise self._error("can be opened", error, fix) from error
        if self._master.csv_monitor is not None:
            self._master.csv_monitor.filenames += known  # these have their header

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Hand over values of a step.

        Raises:
            ServiceError: one of them does not take them.
        """
        if self._master is None:
            return
        try:
            self._master.write_events([(name, value, step) for name, value in scalars.items()])
        except Exception as error:  # whatever a service's client raises
            raise self._error("takes metrics", error, "resume; set enabled to false to go on without it") from error

    def _error(self, rule: str, error: Exception, fix: str) -> ServiceError:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ServiceError(f"DeepSpeed JSON: {', '.join(self._sections)}", self._sections, f"{rule} ({said})", fix)

    def close(self) -> None:
        """Let the services send what they still hold; the process ends without its exit hooks."""
        if self._master is None:
            return
        if self._master.wandb_monitor is not None:
            sys.modules["wandb"].finish()
        if self._master.comet_monitor is not None:
            self._master.comet_monitor.experiment.end()


def _csv_history(folder: Path, resume_step: int) -> list[str]:
    """Drop what a resumed run does again, or put an older run's files aside; the names of the files that are left."""
    if not folder.exists():
        return []
    if not resume_step:
        folder.rename(next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}.{i}")).exists()))
        return []
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [["step", path.stem]]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if _is_up_to(row, resume_step))])
        temporary.replace(path)
    return [path.stem for path in folder.glob("*.csv")]


def _is_up_to(row: list[str], step: int) -> bool:
    return len(row) == 2 and row[0].isdigit() and int(row[0]) <= step  # a line may be cut off by a kill


def _name_wandb_run(run_dir: Path, resume_step: int) -> None:
    """One name for all of a run's processes: Weights & Biases then goes on with its history, whose steps it keeps."""
    path = run_dir / WANDB_RUN_ID
    if not resume_step or not path.exists():
        path.write_text(uuid.uuid4().hex[:16])
    os.environ.setdefault("WANDB_RUN_ID", path.read_text())
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", str(run_dir))
