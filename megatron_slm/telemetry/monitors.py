"""Writes a run's scalars to CSV files, Weights & Biases and Comet through DeepSpeed's monitors.

The monitor sections of the DeepSpeed JSON configure them. They are hidden from DeepSpeed's engine, which would write
under its own names and steps, and write steps again after a resume.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_slm.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from deepspeed.monitor.monitor import MonitorMaster

_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
WANDB_RUN_ID = "wandb_run_id"
"""File in the run's folder with the run's id in Weights & Biases, reused on resume."""


def check_monitors(sections: Mapping[str, Any]) -> None:
    """Validate the monitor sections.

    Raises:
        ConfigError: DeepSpeed rejects a field, or a required package is not installed.
    """
    if not sections:
        return
    from deepspeed.monitor.config import DeepSpeedMonitorConfig

    for name, section in sections.items():
        with accepted_by_deepspeed("monitors"):
            parsed = getattr(DeepSpeedMonitorConfig(**{name: section}), name)
        package = _PACKAGES.get(name)
        if parsed.enabled and package is not None and importlib.util.find_spec(package) is None:
            fix = f"pip install {package}, or set enabled to false in {name}"
            raise ConfigError.missing(f"package {package}", f"section {name} of the DeepSpeed JSON", fix)


@contextmanager
def accepted_by_deepspeed(part: str, prefix: str = "") -> Iterator[None]:
    """Translate the error of a section that DeepSpeed rejects.

    Args:
        part: of DeepSpeed, for the error.
        prefix: of the names of fields in the JSON.

    Raises:
        ConfigError: names the first field that DeepSpeed rejects.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = prefix + ".".join(map(str, first["loc"]))
        rule = f"be accepted by DeepSpeed's {part} ({first['msg']})"
        raise ConfigError(f"DeepSpeed JSON: {field}", first["input"], rule, "correct or remove it") from error


def board_folder(sections: Mapping[str, Any], run_dir: Path) -> Path:
    """Return TensorBoard's folder: that of the section `tensorboard` if enabled, else one in the run's folder."""
    section = sections.get("tensorboard", {})
    if not section.get("enabled") or not section.get("output_path"):
        return run_dir / "tensorboard"
    return Path(section["output_path"]) / section.get("job_name", "tensorboard")


class Monitors:
    """The enabled ones of CSV, Weights & Biases and Comet; used on one rank.

    Args:
        sections: monitor sections of the DeepSpeed JSON.
        run_dir: the run's folder; CSV files go to its subfolder `csv` unless their section sets another.
        resume_step: step of the checkpoint that the run resumes from; 0 for a new run.

    Raises:
        ServiceError: a monitor failed to start.
    """

    def __init__(self, sections: Mapping[str, Any], run_dir: Path, *, resume_step: int) -> None:
        wanted = {name: section for name, section in sections.items() if name != "tensorboard"}
        self._master: MonitorMaster | None = None
        self._enabled = [name for name, section in wanted.items() if section.get("enabled")]
        if not self._enabled:
            return
        from deepspeed.monitor.config import DeepSpeedMonitorConfig
        from deepspeed.monitor.monitor import MonitorMaster

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
            raise self._error("start", error, fix) from error
        if self._master.csv_monitor is not None:
            self._master.csv_monitor.filenames += known  # their headers exist

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the values of a step.

        Raises:
            ServiceError: a monitor failed.
        """
        if self._master is None:
            return
        try:
            self._master.write_events([(name, value, step) for name, value in scalars.items()])
        except Exception as error:  # whatever a service's client raises
            raise self._error("accept metrics", error, "resume, or set enabled to false first") from error

    def _error(self, rule: str, error: Exception, fix: str) -> ServiceError:
        # names only: sections may hold API keys
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ServiceError(f"DeepSpeed JSON: {', '.join(self._enabled)}", "enabled", f"{rule} ({reason})", fix)

    def close(self) -> None:
        """Have the services send buffered values; the process ends without running exit hooks."""
        if self._master is None:
            return
        if self._master.wandb_monitor is not None:
            sys.modules["wandb"].finish()
        if self._master.comet_monitor is not None:
            self._master.comet_monitor.experiment.end()


def _csv_history(folder: Path, resume_step: int) -> list[str]:
    """Drop rows after `resume_step`, or rename an older run's folder; return the names of the remaining files."""
    if not folder.exists():
        return []
    if not resume_step:
        names = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
        folder.rename(next(name for name in names if not name.exists()))
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
    return len(row) == 2 and row[0].isdigit() and int(row[0]) <= step  # a kill may truncate a row


def _name_wandb_run(run_dir: Path, resume_step: int) -> None:
    """Set the run's id in Weights & Biases, kept across resumes so that its history continues."""
    path = run_dir / WANDB_RUN_ID
    if not resume_step or not path.exists():
        path.write_text(uuid.uuid4().hex[:16])
    os.environ.setdefault("WANDB_RUN_ID", path.read_text())
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", str(run_dir))
