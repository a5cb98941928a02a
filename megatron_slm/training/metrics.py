"""What a run reports: metrics.jsonl, TensorBoard, and one line on the terminal.

The names below are part of the public interface.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_slm.loss.objective import SOURCE_SUMS, LossSums
from megatron_slm.training.step import StepResult

SCORE_QUANTILES = ("score_p05", "score_p25", "score_p50", "score_p75", "score_p95")


def training_metrics(result: StepResult, *, has_reference: bool, has_scores: bool = True) -> dict[str, float | None]:
    """The losses of a step, in nats per token, and its token counts and norm.

    `loss` is the mean over kept tokens (each times its weight), `loss_all` over valid ones, `loss_unselected` over
    the others. Values of the reference, and of sets that are empty, are None.
    """
    sums = result.sums
    unselected = sums.valid_tokens - sums.kept_tokens
    excess = sums.valid_loss - sums.reference_loss

    def with_reference(total: float, count: float) -> float | None:
        return _mean(total, count) if has_reference else None

    return {
        "loss": _mean(sums.weighted_loss, sums.kept_tokens),
        "loss_all": _mean(sums.valid_loss, sums.valid_tokens),
        "loss_unselected": _mean(sums.valid_loss - sums.kept_loss, unselected),
        "reference_loss": with_reference(sums.reference_loss, sums.valid_tokens),
        "excess_selected": with_reference(sums.kept_excess, sums.kept_tokens),
        "excess_unselected": with_reference(excess - sums.kept_excess, unselected),
        "excess_all": with_reference(excess, sums.valid_tokens),
        "keep_fraction": _mean(sums.kept_tokens, sums.valid_tokens),
        "kept_tokens": sums.kept_tokens,
        "valid_tokens": sums.valid_tokens,
        "nonfinite_tokens": sums.nonfinite_tokens,
        **{name: _mean(getattr(sums, name), sums.ranked_tokens) if has_scores else None for name in SCORE_QUANTILES},
        "grad_norm": _mean(result.grad_norm, 1.0),
    }


def source_metrics(sums: LossSums, names: Sequence[str], consumed: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Each corpus' part of a step, by its name: mean losses in nats over kept and over valid tokens, their counts, and
    how many samples were drawn from it so far."""
    parts = {}
    for i, (name, samples) in enumerate(zip(names, consumed, strict=True)):
        values = sums.by_source[i * len(SOURCE_SUMS) : (i + 1) * len(SOURCE_SUMS)] or (0.0,) * len(SOURCE_SUMS)
        kept_loss, kept, valid_loss, valid = values
        losses = {"loss": _mean(kept_loss, kept), "loss_all": _mean(valid_loss, valid)}
        parts[name] = {**losses, "kept_tokens": kept, "valid_tokens": valid, "samples": samples}
    return parts


def evaluation_loss(sums: LossSums) -> float | None:
    """Mean loss over a held-out set's valid tokens, in nats; None where it is not a finite number."""
    return _mean(sums.valid_loss, sums.valid_tokens)


def _mean(total: float, count: float) -> float | None:
    value = total / count if count else math.nan
    return value if math.isfinite(value) else None  # JSON has no NaN


class MetricsWriter:
    """Rank 0's sink: one JSON object a line, flushed as written, and the same numbers to TensorBoard.

    A resumed run appends; lines of steps that are done again (those after the checkpoint) are dropped first,
    so that the file always tells one history. A run that starts afresh keeps an older run's file beside its
    own, as metrics.1.jsonl, metrics.2.jsonl and so on.
    """

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        kept: list[str] = []
        if path.exists() and path.stat().st_size:
            if resume_step:
                kept = _lines_up_to(path, resume_step)
            else:
                path.rename(next(p for i in count(1) if not (p := run_dir / f"metrics.{i}.jsonl").exists()))
        self.resumed_lines: list[dict[str, Any]] = [json.loads(line) for line in kept]
        """What was recorded up to the step that the run resumes from."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; numbers go to TensorBoard under their names, held-out losses under eval/SET."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        step = values["step"]
        if values.get("event") == "eval":
            values = {f"eval/{values['set']}": values["loss"]}
        elif values.get("event") == "probe":
            values = {"probe/agreement": values["agreement"]}
        else:
            parts = values.get("sources") or {}
            of_sources = {f"source/{name}/{k}": x for name, part in parts.items() for k, x in part.items()}
            values = {f"train/{name}": value for name, value in values.items() if name not in ("step", "sources")}
            values.update(of_sources)
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self.board.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line cut off by a kill
    return kept


class ProgressLine:
    """One line that follows the run: a live bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, title: str, total_steps: int, *, start: int) -> None:
        self.console = Console(stderr=True)
        self.title, self.total = title, total_steps
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total_steps, completed=start, text="")
        self._every, self._said_at = max(1, total_steps // 20), 0.0

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Show where the run stands after `step`."""
        loss = values.get("loss")
        text = f"loss {loss:.3f}" if loss is not None else "loss -"
        text += f"  {values['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._every == 0 or step in (1, self.total) or time.monotonic() - self._said_at > 30:
            self._said_at = time.monotonic()
            self.say(f"{self.title}  step {step}/{self.total}  {text}")

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the live line."""
        if self._bar is not None:
            self._bar.stop()
