"""Token losses of a few fixed texts (`--probe-file`), recorded at each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.analysis.excerpt import texts_of_tokens
from megatron_slm.analysis.probe_records import ProbedTexts, ProbeFolder, ProbeRecord
from megatron_slm.checkpoint.state import RunState
from megatron_slm.data.texts import TextSamples
from megatron_slm.parallel.collectives import broadcast_from_rank_0
from megatron_slm.parallel.meeting import raise_on_all_ranks
from megatron_slm.telemetry.history import disk_errors
from megatron_slm.training.fixed_batch import FixedBatch


@dataclass(kw_only=True)
class TextProbe:
    """Measures W texts of up to s + 1 tokens with the current weights.

    Tokens are ranked as in training: against those of the texts that share their sequence, micro-batch or
    data-parallel micro-step.
    """

    samples: TextSamples
    batch: FixedBatch
    """Of `samples`, padded at their end."""
    decode: Callable[[Sequence[int]], str]
    folder: ProbeFolder
    has_reference: bool
    """A reference model runs on the texts; stored scores cover the run's own samples only."""
    selects: bool
    """The run's selection applies to the texts."""
    texts: ProbedTexts = field(init=False)
    """Set by `prepare`."""

    def prepare(self, *, resume_step: int) -> None:
        """Run the reference on the texts and write them into the run's folder. Collective, before the first step.

        Raises:
            AnalysisError: the resumed run has records of other texts; on every rank.
            RunFolderError: the folder cannot be written; on every rank.
        """
        reference_loss_Ws = None
        if self.has_reference:
            references = self.batch.run_reference()
            reference_loss_Ws = self._gather([x.loss_N for x in references if x is not None])
        self.texts = self._describe(reference_loss_Ws)
        with raise_on_all_ranks(), disk_errors(self.folder.path.parent):
            if dist.get_rank() == 0:
                self.folder.begin(self.texts, resume_step=resume_step)

    def is_recorded(self, step: int) -> bool:
        """True on every rank if the folder has a record of this step. Collective."""
        return broadcast_from_rank_0(dist.get_rank() == 0 and step in self.folder.steps())

    def measure(self, state: RunState) -> ProbeRecord:
        """Measure the texts with the current weights. Collective."""
        probed = self.batch.measure(state, selects=self.selects)
        loss_Ws = self._gather([one.loss_bs for one in probed])
        if not self.selects:
            return ProbeRecord(step=state.step, loss_Ws=loss_Ws)
        score_Ws = self._gather([one.score_bs for one in probed if one.score_bs is not None])
        kept_Ws = self._gather([one.kept_bs for one in probed if one.kept_bs is not None]).astype(np.bool_)
        return ProbeRecord(step=state.step, loss_Ws=loss_Ws, score_Ws=score_Ws, kept_Ws=kept_Ws)

    def _gather(self, parts_bs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Assemble the last stage's values, fp32 [W, s] on every rank, cut to the longest text."""
        whole_Bs = self.batch.gather(parts_bs, torch.float32)
        return whole_Bs[: len(self.samples), : self._length].cpu().numpy()

    def _describe(self, reference_loss_Ws: npt.NDArray[np.float32] | None) -> ProbedTexts:
        own = [self.samples[index] for index in range(len(self.samples))]
        return ProbedTexts(
            tokens_Ws1=np.stack([sample.tokens[: self._length + 1] for sample in own]),
            valid_Ws=np.stack([sample.valid[: self._length] for sample in own]),
            token_texts=tuple(tuple(texts_of_tokens(self.decode, ids.tolist())) for ids in self.samples.ids),
            sources=self.samples.sources,
            reference_loss_Ws=reference_loss_Ws,
        )

    @property
    def _length(self) -> int:
        """Labels of the longest text."""
        return max(ids.size for ids in self.samples.ids) - 1
