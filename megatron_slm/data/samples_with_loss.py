"""Leaves out the samples of an order whose loss mask has no trained token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from megatron_slm.data.index_cache import Arrays, IndexCache
from megatron_slm.data.reading import Piece
from megatron_slm.data.samples import OrderedSamples
from megatron_slm.data.trained_tokens import TrainedTokens
from megatron_slm.errors import CorpusError


def numbers_with_loss(
    order: OrderedSamples, trained: Callable[[], TrainedTokens], mask_fingerprint: str, cache: IndexCache
) -> Arrays:
    """Return the numbers of the samples that have a trained token, rising, int64, as the array `numbers`.

    Args:
        order: samples of a corpus with a loss mask.
        trained: reads the loss mask, unless the cache has the numbers.
        mask_fingerprint: identifies the content of the loss mask.
        cache: cache of the numbers.

    Raises:
        CorpusError: no sample has one.
    """

    def build() -> Arrays:
        return {"numbers": np.flatnonzero(order.trained_labels(trained())).astype(np.int64)}

    made_from = f"{order.order_fingerprint} {mask_fingerprint}"
    arrays = cache.arrays("with-loss", made_from, order.loss_mask, build)
    if not arrays["numbers"].size:
        raise CorpusError(
            f"{order.name}: samples with a trained token",
            0,
            f"be at least one of {len(order)}; the loss mask leaves nothing to train on",
            "check the loss mask, or raise --seq-length: prompts may fill the samples",
        )
    return arrays


class SamplesWithLoss(OrderedSamples):
    """The samples of an order that have a trained token, in its order.

    Args:
        order: all samples.
        arrays: see `numbers_with_loss`.
        mask_fingerprint: identifies the content of the loss mask.
    """

    def __init__(self, order: OrderedSamples, arrays: Arrays, mask_fingerprint: str) -> None:
        self._order, self._arrays, self._mask_fingerprint = order, arrays, mask_fingerprint
        self._num_samples = len(arrays["numbers"])
        super().__init__(
            order.corpus,
            order._start,
            order._stop,
            sequence_length=order.sequence_length,
            num_samples=None,
            seed=order._seed,
            loss_mask=order.loss_mask,
            columns=order.columns,
        )
        self.num_left_out = len(order) - self._num_samples

    @override
    def _lay_out(self, num_samples: int | None) -> None:
        self.num_epochs = self._order.num_epochs

    @property
    @override
    def order_fingerprint(self) -> str:
        return self._fingerprint(self._order.order_fingerprint, "with loss", self._mask_fingerprint)

    @override
    def __len__(self) -> int:
        return self._num_samples

    @override
    def _pieces(self, index: int) -> list[Piece]:
        return self._order.pieces(int(self._arrays["numbers"][index]))

    @override
    def trained_labels(self, trained: TrainedTokens) -> npt.NDArray[np.int64]:
        return self._order.trained_labels(trained)[self._arrays["numbers"]]
