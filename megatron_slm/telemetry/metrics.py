"""Writes a run's metrics to metrics.jsonl, TensorBoard and monitors.

Names of metrics are part of the public interface; docs/metrics.md describes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_slm.engine.rows import RowSums
from megatron_slm.engine.trainer import StepResult
from megatron_slm.loss.sums import SCORE_QUANTILES, LossSums, SourceSums
from megatron_slm.telemetry.history import KEEP_ALL, History
from megatron_slm.telemetry.monitors import Monitors, board_folder

BAD_BATCHES = "bad_batches.jsonl"
"""File in the run's folder with one JSON object for each bad step."""
ROUNDING_NOISE_EPSILONS = 10.0
"""Standard deviation of the rounding errors of excess losses, in nats per epsilon of the models' dtype: 0.08 nats in
bf16, as in a model of 30 blocks and 135M parameters."""
_BAD_BATCH_METRICS = ("step", "reason", "skipped", "first_sample", "num_samples", "loss_all", "loss_limit", "grad_norm")


def training_metrics(
    result: StepResult, *, has_reference: bool, has_scores: bool = True, distills: bool = False
) -> dict[str, Any]:
    """Return a step's losses in nats per token, token counts and gradient norm.

    `loss` is the weighted mean over kept tokens, `loss_all` the mean over valid tokens, `loss_unselected` over valid
    tokens that are not kept. Means over no tokens are None, and so is the reference's part without a reference.
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
        "divergence": _mean(sums.divergence, sums.kept_tokens) if distills else None,
        "excess_selected": with_reference(sums.kept_excess, sums.kept_tokens),
        "excess_unselected": with_reference(excess - sums.kept_excess, unselected),
        "excess_all": with_reference(excess, sums.valid_tokens),
        "excess_spread": _spread(excess, sums.excess_squares, sums.valid_tokens) if has_reference else None,
        "keep_fraction": _mean(sums.kept_tokens, sums.valid_tokens),
        "kept_tokens": sums.kept_tokens,
        "valid_tokens": sums.valid_tokens,
        "nonfinite_tokens": sums.nonfinite_tokens,
        **{name: _mean(getattr(sums, name), sums.ranked_tokens) if has_scores else None for name in SCORE_QUANTILES},
        "grad_norm": _mean(result.grad_norm, 1.0),
        **row_metrics(result.rows),
        "skip_reason": result.skip_reason,
    }


def describe_weak_reference(spread: float | None, dtype: torch.dtype) -> str | None:
    """Describe excess losses that differ by no more than rounding; None where they differ by more, or are unknown.

    Args:
        spread: standard deviation of the excess losses in nats.
        dtype: dtype of the models' computations.
    """
    noise = ROUNDING_NOISE_EPSILONS * torch.finfo(dtype).eps
    if spread is None or spread > noise:
        return None
    precision, way_out = ("bf16", ", or train in fp32") if dtype == torch.bfloat16 else ("fp32", "")
    return (
        f"excess losses have a spread of {spread:.2g} nats, within the rounding noise of {precision} (about "
        f"{noise:.2g}): the reference hardly differs from the model, and the selection is close to random; use a "
        f"reference that was trained longer or on other data{way_out}"
    )


def row_metrics(rows: RowSums | None) -> dict[str, float | None]:
    """Rows of a step's backward passes: their share, and the variance that drawing them added to the gradient, relative
    to its squared norm; means over blocks, and of the variance the largest. None where nothing was drawn."""
    shares, variances = ([], []) if rows is None else (list(rows.rows), rows.variances)
    return {
        "backward_row_share": _mean(sum(shares), len(shares)),
        "backward_added_variance": _mean(sum(variances), len(variances)),
        "backward_added_variance_max": _mean(max(variances, default=math.nan), 1.0),
    }


def source_metrics(sums: LossSums, names: Sequence[str], consumed: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return each corpus' part of a step: mean losses in nats over kept and over valid tokens, token counts, and the
    number of samples drawn from it so far."""
    parts = {}
    for i, (name, samples) in enumerate(zip(names, consumed, strict=True)):
        of_source = sums.by_source[i] if sums.by_source else SourceSums()
        parts[name] = {
            "loss": _mean(of_source.kept_loss, of_source.kept_tokens),
            "loss_all": _mean(of_source.valid_loss, of_source.valid_tokens),
            "kept_tokens": of_source.kept_tokens,
            "valid_tokens": of_source.valid_tokens,
            "samples": samples,
        }
    return parts


def evaluation_loss(sums: LossSums) -> float | None:
    """Return the mean loss over valid tokens, in nats; None if it is not finite."""
    return _mean(sums.valid_loss, sums.valid_tokens)


def _mean(total: float, count: float) -> float | None:
    value = total / count if count else math.nan
    return value if math.isfinite(value) else None  # JSON has no NaN


def _spread(total: float, squares: float, count: float) -> float | None:
    """Return the standard deviation of `count` numbers from their sum and the sum of their squares."""
    mean, mean_square = _mean(total, count), _mean(squares, count)
    return None if mean is None or mean_square is None else math.sqrt(max(0.0, mean_square - mean**2))


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics under their names in TensorBoard and monitors.

    `train/NAME`, `timers/NAME/min` and `/max`, `source/CORPUS/NAME` and `ranks/NAME` for steps; `eval/SET` for held-out
    losses; `probe/agreement`; `bad_batch/loss_all` and `bad_batch/skipped` for bad steps.
    """
    event = line.get("event")
    if event == "eval":
        found = {f"eval/{line['set']}": line["loss"]}
    elif event == "probe":
        found = {"probe/agreement": line["agreement"]}
    elif event == "bad-batch":
        found = {f"bad_batch/{name}": line[name] for name in ("loss_all", "skipped")}
    else:
        found = {f"train/{name}": value for name, value in line.items() if name != "step"}
        found |= {f"ranks/{name}": value for name, value in (line.get("ranks") or {}).items()}
        for kind, parts in (("timers", line.get("timers_ms") or {}), ("source", line.get("sources") or {})):
            found |= {f"{kind}/{name}/{k}": x for name, part in parts.items() for k, x in part.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


class MetricsWriter:
    """Writes metrics on rank 0: to metrics.jsonl, TensorBoard and monitors.

    Args:
        resume_step: step of the checkpoint that the run resumes from; 0 for a new run, KEEP_ALL for an evaluation.
        monitors: monitor sections of the DeepSpeed JSON.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, monitors: Mapping[str, Any] = MappingProxyType({})) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = History(run_dir / "metrics.jsonl", resume_step=resume_step)
        self._bad_batches = History(run_dir / BAD_BATCHES, resume_step=resume_step)
        self.resumed_lines = self._metrics.resumed_lines
        self._monitors = Monitors(monitors, run_dir, resume_step=resume_step)
        purge = resume_step + 1 if 0 < resume_step < KEEP_ALL else None
        self.board = SummaryWriter(str(board_folder(monitors, run_dir)), purge_step=purge)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line of metrics."""
        self._metrics.append(line)
        values = scalars(line)
        for name, value in values.items():
            self.board.add_scalar(name, value, line["step"])
        self._monitors.write(values, line["step"])

    def bad_batch(self, line: dict[str, Any]) -> None:
        """Append a bad step to its own log, and its main fields to the metrics."""
        self._bad_batches.append(line)
        self.write({"event": "bad-batch", **{name: line[name] for name in _BAD_BATCH_METRICS}})

    def flush(self) -> None:
        """Flush TensorBoard's queue to disk."""
        self.board.flush()

    def close(self) -> None:
        """Flush and close all outputs."""
        try:
            self.board.close()
        finally:
            self._monitors.close()
