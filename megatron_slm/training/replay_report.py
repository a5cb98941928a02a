"""Replays bad batches in the world the launcher made and prints what each micro-batch shows."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_slm.config.run import RunConfig
from megatron_slm.files import write_json
from megatron_slm.operations.reach import name_silent_nodes
from megatron_slm.parallel.collectives import translate_peer_errors
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.progress import track
from megatron_slm.training.health import BadBatch
from megatron_slm.training.replay import (
    MicroBatchReplay,
    Replay,
    SampleReplay,
    as_json,
    open_weights,
    worst_samples,
)

logger = logging.getLogger(__name__)


def replay(
    config: RunConfig, records: Sequence[BadBatch], *, worst: int = 3, context: int = 48, output: str | None = None
) -> list[dict[str, Any]]:
    """Replay records in the world the launcher made, and print what is found.

    Raises:
        SlmError: on every rank alike.
    """
    init_distributed(timedelta(minutes=config.parallel.distributed_timeout_minutes))
    found: list[dict[str, Any]] = []
    with name_silent_nodes(), translate_peer_errors("the replay"), tempfile.TemporaryDirectory() as scratch:
        resume = open_weights(config)
        with raise_on_all_ranks():
            if output is not None and dist.get_rank() == 0:
                write_json(output, found, flag="--output")  # that it can be, is known before the work
        replayed = Replay(config, resume, Path(scratch))
        step = resume.manifest.step if resume else 0
        logger.info("weights after step %d%s", step, f" ({resume.folder})" if resume else " (where the run starts)")
        for record in track(records, "replaying", "batches", shown=dist.get_rank() == 0):
            micro_batches = replayed.batch(record)
            found.append(as_json(record, micro_batches))
            with raise_on_all_ranks():
                if dist.get_rank() == 0:
                    _print(record, micro_batches, replayed, worst_samples(micro_batches, worst), context)
                    if output is not None:
                        write_json(output, found, flag="--output")
        dist.barrier()  # nobody leaves while another still works
    return found


def _print(
    record: BadBatch,
    micro_batches: Sequence[MicroBatchReplay],
    replayed: Replay,
    worst: Sequence[SampleReplay],
    context: int,
) -> None:
    console = Console()
    last = record.first_sample + record.num_samples - 1
    table = Table(
        title=f"Step {record.step} ({record.reason}), samples {record.first_sample} to {last}, by micro-batches"
    )
    headings = ("samples", "corpus", "loss", "loss, all", "recorded", "bad losses/scores", "grad norm", "verdict")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("corpus", "verdict") else "right", overflow="fold")
    for part in micro_batches:
        numbers = [sample.sample for sample in part.samples]
        stages = part.nonfinite_gradient_below_stages
        table.add_row(
            f"{numbers[0]}-{numbers[-1]}",
            ", ".join(dict.fromkeys(escape(sample.source) for sample in part.samples)),
            _number(part.loss),
            _number(part.loss_all),
            _number(part.recorded_loss_all),
            f"{part.nonfinite_losses} / {part.nonfinite_scores}",
            _number(part.grad_norm),
            (part.skip_reason or "sound") + (f" (gradient below stage {stages[-1]})" if stages else ""),
        )
    console.print(table)
    for sample in worst:
        references = "" if sample.reference_loss is None else f", reference {_number(sample.reference_loss)}"
        console.print(
            f"[bold]sample {sample.sample}[/bold] of {escape(sample.source)}: loss {_number(sample.loss_all)}, highest "
            f"{_number(sample.worst_loss)}{references}; not finite: {sample.nonfinite_losses} losses, "
            f"{sample.nonfinite_references} references; {sample.kept_tokens} of {sample.valid_tokens} tokens kept",
            highlight=False,
            soft_wrap=True,
        )
        console.print(escape(replayed.text(sample, context)), highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
