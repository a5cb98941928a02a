"""Two references whose difference is the score: a reference and the base that it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_slm.loss.objective import Objective
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.types import Documents, MicroBatch, TokenStatistics


class ReferencePair(nn.Module):
    """The stages of two references on one rank, in the place of one: each token's loss is the first one's less the
    second one's.

    Between stages, their hidden states travel as one message, side by side, so that every schedule that is right for
    one reference is for two.

    Args:
        reference: stage of the reference.
        base: stage of the model it is compared with, of any depth and width.
    """

    def __init__(self, reference: FrozenStage, base: FrozenStage) -> None:
        super().__init__()
        self.reference, self.base = reference, base

    @property
    def message_width(self) -> int:
        """Hidden sizes of both together."""
        return self.reference.message_width + self.base.message_width

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """Token ids [b, s] on the first stage, else hidden states of both [s, b, d + d'], to those of both.

        Args:
            documents: of the micro-batch, where attention keeps them apart; None for whole samples.
        """
        of_reference, of_base = (x, x) if not x.is_floating_point() else self._split(x)
        return torch.cat([self.reference(of_reference, documents), self.base(of_base, documents)], -1)

    def statistics(
        self, x_sbd: Tensor, objective: Objective, batch: MicroBatch, *, trains: bool = True
    ) -> TokenStatistics:
        """Compute the difference of both token losses; on the last stage only. `--loss` distils from one alone."""
        of_reference, of_base = self._split(x_sbd)
        loss_N = self.reference.statistics(of_reference, objective, batch, trains=trains).loss_N
        return TokenStatistics(loss_N - self.base.statistics(of_base, objective, batch, trains=trains).loss_N)

    def _split(self, x_sbd: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in x_sbd.split([self.reference.message_width, self.base.message_width], -1)]
