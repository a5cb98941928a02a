"""Key and value heads over the tensor-parallel ranks: an equal share each, or one head for several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.errors import LayoutError
from megatron_slm.parallel.collectives import gather_from
from megatron_slm.parallel.groups import TensorParallel


class KeyValueHeads:
    """The key and value heads that this rank's queries attend to.

    With fewer heads than ranks, adjacent ranks share one: each projects an equal slice of it, and the slices are
    gathered. The weights are then cut like any others, so that no gradient, norm or checkpoint has them twice, and the
    gradients of a head are summed over its ranks on the way back (reduce-scatter).

    Args:
        total: key/value heads of the model.

    Raises:
        LayoutError: neither of the two numbers is a multiple of the other.
    """

    def __init__(self, tp: TensorParallel, total: int) -> None:
        if total % tp.size and tp.size % total:
            raise LayoutError(
                "number of query groups",
                total,
                f"be divisible by --tensor-model-parallel-size ({tp.size}), or divide it",
                "choose a tensor-parallel size that divides it, or a multiple of it",
            )
        self.count = max(1, total // tp.size)
        """Heads on this rank."""
        self.num_sharing = max(1, tp.size // total)
        """Ranks that share a head."""
        self._sharing = next((ranks for ranks in tp.sharing if ranks.size == self.num_sharing), None)

    def whole(self, k_sbf: Tensor, v_sbf: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they were projected here, [s, b, width / size], to whole heads, [s, b, count * k]."""
        if self.num_sharing == 1:
            return k_sbf, v_sbf
        assert self._sharing is not None, "ranks that share a head have a group"
        slices = gather_from(torch.stack([k_sbf, v_sbf]), self._sharing).unflatten(0, (self.num_sharing, 2))
        k_sbk, v_sbk = slices.permute(1, 2, 3, 0, 4).flatten(-2)
        return k_sbk, v_sbk
