"""A fixed batch that is run through the model again and again beside training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.checkpoint.state import RunState
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.device import local_device
from megatron_slm.engine.trainer import Trainer
from megatron_slm.loss.objective import ScoredTokens, StepSettings
from megatron_slm.parallel.context import positions
from megatron_slm.parallel.groups import ContextParallel
from megatron_slm.parallel.topology import Topology
from megatron_slm.types import TokenStatistics


@dataclass(kw_only=True)
class FixedBatch:
    """Token losses and selections of B fixed samples with the current weights; no gradient, no effect on training.

    A frozen reference's forward passes run once, in `run_reference`. All methods are collective.
    """

    trainer: Trainer
    source: MicroBatchSource
    """Starts with the samples; padded at its end where they are fewer."""
    topology: Topology
    num_micro_batches: int
    """On each data-parallel rank."""
    reference_changes: bool = False
    """Run the reference at every measurement, before which nothing of a next step may have been done ahead."""
    _references: list[TokenStatistics | None] = field(init=False)

    def __post_init__(self) -> None:
        self._references = [None] * self.num_micro_batches

    def run_reference(self) -> list[TokenStatistics | None]:
        """Compute the reference's statistics; on the last stage, one a micro-batch. Only before the first step."""
        read = partial(self.source.micro_batch, 0)
        self._references = self.trainer.reference_statistics(read, self.num_micro_batches)
        return self._references

    def measure(self, state: RunState, *, selects: bool) -> list[ScoredTokens]:
        """Run the model; on the last stage, one result a micro-batch.

        Args:
            selects: also rank and select the tokens, as the next training step would.
        """
        if selects and self.reference_changes:
            self.run_reference()
        settings = None
        if selects:
            settings = StepSettings(step=state.step, score_threshold=state.score_threshold, keep_ratio=state.keep_ratio)
        return self.trainer.scored_tokens(partial(self.source.micro_batch, 0), self._references, settings)

    def gather(self, parts_bs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Assemble per-token values, [B, s] on every rank's device, from the last stage's micro-batches.

        Args:
            parts_bs: on the last stage, those of the positions held there, one [b, s] or [N] a micro-batch; empty on
                the others.
        """
        num_samples, length = self.num_micro_batches * self.source.samples_together, self.source.samples.sequence_length
        whole_Bs = torch.zeros(num_samples, length, dtype=dtype, device=local_device())
        place = self.topology.coordinate(dist.get_rank())
        if place.tensor == 0:  # the others hold the same
            ranks = ContextParallel(size=self.topology.context, rank=place.context)
            position_s = positions(length, ranks, whole_Bs.device)
            for i, part_bs in enumerate(parts_bs):
                rows_b = self.source.micro_batch(0, i).sample_b.to(whole_Bs.device)
                whole_Bs[rows_b[:, None], position_s] = part_bs.to(dtype).view(len(rows_b), -1)
        dist.all_reduce(whole_Bs)
        return whole_Bs
