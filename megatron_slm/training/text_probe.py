"""Token losses of a few fixed texts (`--probe-file`), recorded at each evaluation: they need no checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.analysis.probe_records import ProbedTexts, ProbeFolder, ProbeRecord
from megatron_slm.analysis.sample import pieces_of
from megatron_slm.data.loader import MicroBatchSource, num_global_batches
from megatron_slm.data.texts import TextSamples
from megatron_slm.device import local_device
from megatron_slm.engine.trainer import Trainer
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.collectives import broadcast_from_rank_0, raise_on_all_ranks
from megatron_slm.parallel.topology import Topology
from megatron_slm.telemetry.history import disk_errors
from megatron_slm.types import TokenStatistics

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextProbe:
    """Looks at the texts with the weights of now, without a gradient and without touching what training has in hand.

    The reference is frozen and the texts are fixed, so its forward passes run once, in `begin`. Tokens are ranked as in
    training: against those of the texts that share their sequence, micro-batch or data-parallel micro-step.
    """

    trainer: Trainer
    samples: TextSamples
    source: MicroBatchSource
    """Of `samples`, padded at their end."""
    topology: Topology
    decode: Callable[[Sequence[int]], str]
    folder: ProbeFolder
    has_reference: bool
    """A reference model takes part; stored scores are of the run's own samples, and say nothing of these."""
    selects: bool
    """Whether the run's selection can be told of these texts."""
    _references: list[TokenStatistics | None] = field(default_factory=list)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a look, on each data-parallel rank."""
        return num_global_batches(len(self.samples), self.source.samples_together)

    def begin(self, *, resume_step: int) -> ProbedTexts:
        """Run the reference on the texts and make the run's folder ready. Collective, before the first step.

        Raises:
            AnalysisError: on every rank: the run that is gone on with has records of other texts.
            RunFolderError: on every rank: the folder cannot be written.
        """
        source = partial(self.source.micro_batch, 0)
        self._references = [None] * self.num_micro_batches
        reference_loss_Ws = None
        if self.has_reference:
            self._references = self.trainer.reference_statistics(source, self.num_micro_batches)
            shape = (-1, self.samples.sequence_length)
            reference_loss_Ws = self._gather([x.loss_N.view(shape) for x in self._references if x is not None])
        texts = self._texts(reference_loss_Ws)
        with raise_on_all_ranks(), disk_errors(self.folder.path.parent):
            if dist.get_rank() == 0:
                self.folder.begin(texts, resume_step=resume_step)
        return texts

    def is_recorded(self, step: int) -> bool:
        """Whether a step has its record, on every rank alike. Collective."""
        return broadcast_from_rank_0(dist.get_rank() == 0 and step in self.folder.steps())

    def record(self, settings: StepSettings) -> ProbeRecord:
        """Look at the texts. Collective."""
        source = partial(self.source.micro_batch, 0)
        said = self.trainer.probe(source, self._references, settings if self.selects else None)
        loss_Ws = self._gather([probed.loss_bs for probed in said])
        record = ProbeRecord(step=settings.step, loss_Ws=loss_Ws)
        if self.selects:
            score_Ws = self._gather([probed.score_bs for probed in said if probed.score_bs is not None])
            kept_Ws = self._gather([probed.kept_bs for probed in said if probed.kept_bs is not None])
            record = ProbeRecord(
                step=settings.step, loss_Ws=loss_Ws, score_Ws=score_Ws, kept_Ws=kept_Ws.astype(np.bool_)
            )
        return record

    def _gather(self, parts_bs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """What the last stage has of the texts, fp32 [W, s] on every rank, cut to the longest text."""
        whole_Bs = torch.zeros(
            self.num_micro_batches * self.source.samples_together, self.samples.sequence_length, device=local_device()
        )
        if self.topology.coordinate(dist.get_rank()).tensor == 0:  # the others have the same
            for i, part_bs in enumerate(parts_bs):
                whole_Bs[self.source.micro_batch(0, i).sample_b.to(whole_Bs.device)] = part_bs.float()
        dist.all_reduce(whole_Bs)
        length = max(ids.size for ids in self.samples.ids) - 1
        return whole_Bs[: len(self.samples), :length].cpu().numpy()

    def _texts(self, reference_loss_Ws: npt.NDArray[np.float32] | None) -> ProbedTexts:
        own = [self.samples[index] for index in range(len(self.samples))]
        length = max(ids.size for ids in self.samples.ids) - 1
        return ProbedTexts(
            tokens_Ws1=np.stack([sample.tokens[: length + 1] for sample in own]),
            valid_Ws=np.stack([sample.valid[:length] for sample in own]),
            pieces=tuple(tuple(pieces_of(self.decode, ids.tolist())) for ids in self.samples.ids),
            sources=self.samples.sources,
            reference_loss_Ws=reference_loss_Ws,
        )
