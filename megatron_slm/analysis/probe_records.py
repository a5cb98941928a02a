"""Records of a run's losses on fixed texts (`--probe-file`) at each evaluation, in the run's folder.

    RUN/probe/texts.safetensors           tokens, valid positions and reference losses; metadata: the tokens' texts
    RUN/probe/step_00000100.safetensors   the model's losses after step 100, scores and kept tokens

Files are written durably. Shapes: W texts of up to s + 1 tokens, padded at the end.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_slm.analysis.excerpt import Bools, Excerpt, Ints, Span
from megatron_slm.analysis.losses import Checkpoint
from megatron_slm.errors import AnalysisError
from megatron_slm.files import write_durably

Floats = npt.NDArray[np.float32]
FOLDER = "probe"
_TEXTS = "texts.safetensors"
_RECORD = re.compile(r"step_(\d{8,})\.safetensors")
_TEMPORARY = re.compile(r"\..+\.tmp")


@dataclass(frozen=True, kw_only=True)
class ProbedTexts:
    """Tokens of the fixed texts."""

    tokens_Ws1: Ints
    valid_Ws: Bools
    token_texts: tuple[tuple[str, ...], ...]
    """Text of each token, without padding."""
    sources: tuple[str, ...]
    """Source of each text."""
    reference_loss_Ws: Floats | None = None
    """Reference losses in nats, 0 where not predicted; None without a reference."""

    def excerpt(self) -> Excerpt:
        """Return the texts as an excerpt."""
        pairs = zip(self.sources, self.token_texts, strict=True)
        spans = tuple(Span(source=source, token_texts=texts) for source, texts in pairs)
        return Excerpt(tokens_Ws1=self.tokens_Ws1, valid_Ws=self.valid_Ws, spans=spans, tokenizer=None)


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """Losses and selection of the texts at one step."""

    step: int
    loss_Ws: Floats
    """Token losses in nats, 0 where not predicted."""
    score_Ws: Floats | None = None
    """Scores of the run's selection; None for a run without one."""
    kept_Ws: Bools | None = None
    """Tokens that the run's selection keeps; None for a run without one."""


class ProbeFolder:
    """Records of one run."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / FOLDER

    def record_path(self, step: int) -> Path:
        """Return the path of a step's record."""
        return self.path / f"step_{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Return the recorded steps in order."""
        found = (_RECORD.fullmatch(path.name) for path in self.path.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def discard_after(self, step: int) -> None:
        """Delete incomplete files and the records after `step`, for a run that resumes there.

        Step 0, a new run, keeps older records: it renames the folder to probe.1, probe.2 and so on.
        """
        if step == 0 and self.path.exists():
            self.path.rename(_unused_name(self.path))
        for path in self.path.glob("*"):
            match = _RECORD.fullmatch(path.name)
            if _TEMPORARY.fullmatch(path.name) or (match and int(match[1]) > step):
                path.unlink()

    def begin(self, texts: ProbedTexts, *, resume_step: int) -> None:
        """Prepare the folder for a run that resumes after `resume_step`; 0 for a new run.

        Raises:
            AnalysisError: the resumed run recorded other texts.
        """
        self.discard_after(resume_step)
        if self.steps() and not np.array_equal(self.texts().tokens_Ws1, texts.tokens_Ws1):
            raise AnalysisError(
                "--probe-file: records",
                str(self.path),
                "be of the same texts",
                "use the file that the run started with, or move the folder away",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Any] = {"tokens": texts.tokens_Ws1, "valid": texts.valid_Ws}
        if texts.reference_loss_Ws is not None:
            tensors["reference_loss"] = texts.reference_loss_Ws
        metadata = {"texts": json.dumps({"pieces": texts.token_texts, "sources": texts.sources})}
        write_durably(self.path / _TEXTS, save(tensors, metadata=metadata))

    def write(self, record: ProbeRecord) -> None:
        """Write a step's record, replacing an older one of that step."""
        tensors: dict[str, Any] = {"loss": record.loss_Ws}
        if record.score_Ws is not None and record.kept_Ws is not None:
            tensors |= {"score": record.score_Ws, "kept": record.kept_Ws}
        write_durably(self.record_path(record.step), save(tensors))

    def texts(self) -> ProbedTexts:
        """Read the recorded texts.

        Raises:
            AnalysisError: there are no records, or the file is damaged.
        """
        path = self.path / _TEXTS
        if not path.is_file():
            raise AnalysisError(
                "--probe",
                str(self.path.parent),
                "be the folder of a run trained with --probe-file",
                "train with that flag",
            )
        tensors, metadata = _read(path)
        texts = json.loads(metadata["texts"])
        return ProbedTexts(
            tokens_Ws1=tensors["tokens"],
            valid_Ws=tensors["valid"],
            token_texts=tuple(map(tuple, texts["pieces"])),
            sources=tuple(texts["sources"]),
            reference_loss_Ws=tensors.get("reference_loss"),
        )

    def read(self, step: int) -> ProbeRecord:
        """Read the record of a step.

        Raises:
            AnalysisError: the file is damaged.
        """
        tensors, _ = _read(self.record_path(step))
        return ProbeRecord(
            step=step, loss_Ws=tensors["loss"], score_Ws=tensors.get("score"), kept_Ws=tensors.get("kept")
        )


def recorded_losses(run: str) -> tuple[Excerpt, list[Checkpoint], Floats]:
    """Read a run's texts, the recorded steps, and the losses of the predicted tokens at each, fp32 [C, N].

    Raises:
        AnalysisError: there are no records, a file is damaged, or a loss is not finite.
    """
    folder = ProbeFolder(run)
    texts = folder.texts()
    checkpoints, rows = [], []
    for step in folder.steps():
        loss_N = folder.read(step).loss_Ws[texts.valid_Ws]
        if not np.isfinite(loss_N).all():
            raise AnalysisError(
                f"{folder.path}: number of non-finite losses at step {step}",
                int((~np.isfinite(loss_N)).sum()),
                "be 0",
                "delete this record",
            )
        checkpoints.append(Checkpoint(label=f"step {step:,}", path=str(folder.record_path(step)), step=step))
        rows.append(loss_N)
    loss_CN = np.stack(rows) if rows else np.empty((0, int(texts.valid_Ws.sum())), np.float32)
    return texts.excerpt(), checkpoints, loss_CN


def _unused_name(path: Path) -> Path:
    """Return the first of PATH.1, PATH.2 and so on that does not exist."""
    number = 1
    while (renamed := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return renamed


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AnalysisError(
            "probe record", str(path), f"be an undamaged safetensors file ({error})", "delete it, and keep the others"
        ) from error
