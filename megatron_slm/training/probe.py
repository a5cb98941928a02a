"""How much a selection changes: which tokens of one fixed batch are kept, now and at the probe before."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.device import local_device
from megatron_slm.engine.trainer import Trainer
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.topology import Topology
from megatron_slm.types import TokenStatistics


def agreement(before: Tensor | None, now: Tensor) -> float | None:
    """`|A ∩ B| / |A ∪ B|` of two sets of kept tokens, given as masks; 1 where nothing changed.

    None where there is no set before, or one of another batch, or both are empty.
    """
    if before is None or before.shape != now.shape:
        return None
    union = int((before | now).sum())
    return int((before & now).sum()) / union if union else None


@dataclass(kw_only=True)
class Probe:
    """Selects on the run's first global batch, without a gradient and without touching what training has in hand.

    The reference is frozen and the batch is fixed, so its forward passes run once, in `prepare`.
    """

    trainer: Trainer
    source: MicroBatchSource
    topology: Topology
    global_batch_size: int
    num_micro_batches: int
    interval: int
    _references: list[TokenStatistics | None] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Whether there is a probe after `step` steps."""
        return step % self.interval == 0

    def prepare(self) -> None:
        """Run the reference on the batch. Collective."""
        source = partial(self.source.micro_batch, 0)
        self._references = self.trainer.reference_statistics(source, self.num_micro_batches)

    def kept(self, settings: StepSettings) -> Tensor:
        """Which tokens of the batch are kept with the weights of now, bool [samples, s] on every rank. Collective."""
        source = partial(self.source.micro_batch, 0)
        said = self.trainer.scored_tokens(source, self._references, settings)
        length = self.source.samples.sequence_length
        kept_Bs = torch.zeros(self.global_batch_size, length, dtype=torch.uint8, device=local_device())
        if self.topology.coordinate(dist.get_rank()).tensor == 0:  # the others have the same
            for i, probed in enumerate(said):
                assert probed.kept_bs is not None, "with settings there is a selection"
                kept_Bs[source(i).sample_b.to(kept_Bs.device)] = probed.kept_bs.to(torch.uint8)
        dist.all_reduce(kept_Bs)
        return kept_Bs.bool().cpu()
