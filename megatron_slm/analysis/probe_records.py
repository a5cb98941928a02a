"""What a run said of a few fixed texts (`--probe-file`) at each evaluation, in its folder.

    RUN/probe/texts.safetensors           tokens, which of them are predicted, the reference's losses; the texts' pieces
    RUN/probe/step_00000100.safetensors   the model's losses after step 100, scores, and which tokens are kept

Each file is whole or absent. Shapes: W texts of up to s + 1 tokens, padded at the end.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_slm.analysis.losses import Stage
from megatron_slm.analysis.sample import Bools, Ints, Sample, Window
from megatron_slm.errors import AnalysisError
from megatron_slm.files import write_durably

Floats = npt.NDArray[np.float32]
FOLDER = "probe"
_TEXTS = "texts.safetensors"
_RECORD = re.compile(r"step_(\d{8,})\.safetensors")
_TEMPORARY = re.compile(r"\..+\.tmp")


@dataclass(frozen=True, kw_only=True)
class ProbedTexts:
    """The texts."""

    tokens_Ws1: Ints
    valid_Ws: Bools
    pieces: tuple[tuple[str, ...], ...]
    """The text of each token, without padding."""
    sources: tuple[str, ...]
    """Where each text is from."""
    reference_loss_Ws: Floats | None = None
    """In nats, 0 where not predicted; None without a reference."""

    def sample(self) -> Sample:
        """The texts as analyses take them."""
        windows = [
            Window(source=source, pieces=pieces) for source, pieces in zip(self.sources, self.pieces, strict=True)
        ]
        return Sample(tokens_Ws1=self.tokens_Ws1, valid_Ws=self.valid_Ws, windows=tuple(windows), tokenizer=None)


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """What was said of them at one step."""

    step: int
    loss_Ws: Floats
    """In nats, 0 where not predicted."""
    score_Ws: Floats | None = None
    kept_Ws: Bools | None = None
    """Which tokens the run's selection keeps; this and the scores are None where the run selects nothing."""


class ProbeFolder:
    """The records of one run."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / FOLDER

    def steps(self) -> list[int]:
        """The steps that are recorded, in order."""
        found = (_RECORD.fullmatch(path.name) for path in self.path.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def go_on_after(self, step: int) -> None:
        """Make way for a run that goes on after `step`: records of later steps are removed, and what is half-written.

        A run that starts afresh (0) leaves older records as probe.1, probe.2 and so on.
        """
        if not step and self.path.exists():
            self.path.rename(next(p for i in count(1) if not (p := self.path.with_name(f"{FOLDER}.{i}")).exists()))
        for path in self.path.glob("*") if self.path.is_dir() else ():
            match = _RECORD.fullmatch(path.name)
            if _TEMPORARY.fullmatch(path.name) or (match and int(match[1]) > step):
                path.unlink()

    def begin(self, texts: ProbedTexts, *, resume_step: int) -> None:
        """Make the folder ready for a run that goes on after `resume_step`; 0: one that starts afresh.

        Raises:
            AnalysisError: the run that is gone on with has records of other texts.
        """
        self.go_on_after(resume_step)
        if self.steps():
            before = self.texts()
            if not np.array_equal(before.tokens_Ws1, texts.tokens_Ws1):
                raise AnalysisError(
                    "--probe-file",
                    str(self.path),
                    "names the texts that the run's records are of",
                    "give the file that the run began with, or move the folder away",
                )
        self.path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {"tokens": texts.tokens_Ws1, "valid": texts.valid_Ws}
        if texts.reference_loss_Ws is not None:
            tensors["reference_loss"] = texts.reference_loss_Ws
        said = json.dumps({"pieces": texts.pieces, "sources": texts.sources})
        write_durably(self.path / _TEXTS, save(tensors, metadata={"texts": said}))

    def write(self, record: ProbeRecord) -> None:
        """Add a step's record; it replaces one of the same step."""
        tensors: dict[str, Any] = {"loss": record.loss_Ws}
        if record.score_Ws is not None and record.kept_Ws is not None:
            tensors |= {"score": record.score_Ws, "kept": record.kept_Ws}
        write_durably(self.path / f"step_{record.step:08d}.safetensors", save(tensors))

    def texts(self) -> ProbedTexts:
        """The texts that the records are of.

        Raises:
            AnalysisError: there are none, or the file is damaged.
        """
        path = self.path / _TEXTS
        if not path.is_file():
            raise AnalysisError(
                "--probe",
                str(self.path.parent),
                "is a run's folder with records of --probe-file",
                "train with that flag",
            )
        tensors, metadata = _read(path)
        said = json.loads(metadata["texts"])
        return ProbedTexts(
            tokens_Ws1=tensors["tokens"],
            valid_Ws=tensors["valid"],
            pieces=tuple(map(tuple, said["pieces"])),
            sources=tuple(said["sources"]),
            reference_loss_Ws=tensors.get("reference_loss"),
        )

    def read(self, step: int) -> ProbeRecord:
        """The record of a step.

        Raises:
            AnalysisError: the file is damaged.
        """
        tensors, _ = _read(self.path / f"step_{step:08d}.safetensors")
        return ProbeRecord(
            step=step, loss_Ws=tensors["loss"], score_Ws=tensors.get("score"), kept_Ws=tensors.get("kept")
        )


def recorded_losses(run: str) -> tuple[Sample, list[Stage], Floats]:
    """A run's texts, the steps that are recorded, and the losses of the predicted tokens at each, [C, N].

    Raises:
        AnalysisError: there is nothing recorded, a file is damaged, or a loss is not finite.
    """
    folder = ProbeFolder(run)
    texts = folder.texts()
    stages, rows = [], []
    for step in folder.steps():
        loss_N = folder.read(step).loss_Ws[texts.valid_Ws]
        if not np.isfinite(loss_N).all():
            raise AnalysisError(
                f"{folder.path}: step {step}", "a loss that is not finite", "holds finite losses", "remove the record"
            )
        stages.append(Stage(label=f"step {step:,}", path=str(folder.path / f"step_{step:08d}.safetensors"), step=step))
        rows.append(loss_N)
    loss_CN = np.stack(rows) if rows else np.empty((0, int(texts.valid_Ws.sum())), np.float32)
    return texts.sample(), stages, loss_CN


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AnalysisError(
            "probe record", str(path), f"is a whole safetensors file ({error})", "remove it: the others are read"
        ) from error
