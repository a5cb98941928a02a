"""Rank-side of tests of document boundaries: what every token's loss is, of the model and the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_slm.flags.load import parse
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags


def token_losses(values: dict[str, Any]) -> dict[int, dict[str, np.ndarray]]:
    """By sample number: tokens, labels, valid, token losses and reference losses, [s] each."""
    seen: dict[int, dict[str, np.ndarray]] = {}

    def observe(batch: Any, token_loss_N: Any, reference_loss_N: Any, kept_K: Any) -> None:
        columns = {"tokens": batch.tokens_bs, "labels": batch.labels_bs, "valid": batch.valid_bs}
        columns["loss"] = token_loss_N.view_as(batch.valid_bs)
        if reference_loss_N is not None:
            columns["reference"] = reference_loss_N.view_as(batch.valid_bs)
        for row, sample in enumerate(batch.sample_b.tolist()):
            seen[sample] = {name: column[row].detach().numpy().copy() for name, column in columns.items()}

    pretrain(parse(flags(values))[0], observer=observe)
    return seen
