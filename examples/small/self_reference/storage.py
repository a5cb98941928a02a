"""Count the kept tokens that another `--score-dtype` changes, by selecting with rounded scores during training.

    python examples/small/self_reference/storage.py --config examples/small/self_reference/train.yaml \
      --reference-scores runs/self_reference/scores --pipeline-model-parallel-size 1 --run-dir runs/storage

takes the flags of pretrain_slm.py, runs in one process, and trains from an fp32 store; at every micro-batch it also
selects by the excess over the reference losses rounded to each dtype, with the same weights.
"""

from __future__ import annotations

import math
import sys
from collections import Counter

import torch
from torch import Tensor

from megatron_slm.flags.load import parse
from megatron_slm.log import setup_logging
from megatron_slm.training.pretrain import pretrain
from megatron_slm.types import MicroBatch

DTYPES = (torch.bfloat16, torch.float16)


def kept(score_N: Tensor, valid_N: Tensor, keep_ratio: float) -> Tensor:
    """Return the kept rows of a micro-batch, ascending: the highest scores of valid tokens, ties to the lower row."""
    count = math.ceil(keep_ratio * int(valid_N.sum()))
    order = score_N.masked_fill(~valid_N, -math.inf).argsort(descending=True, stable=True)
    return order[:count].sort().values


def main(argv: list[str]) -> Counter[str]:
    """Train, and return the number of kept tokens, in total ("kept") and replaced by others with each dtype."""
    config, _ = parse(argv)
    counts: Counter[str] = Counter()

    def observe(batch: MicroBatch, loss_N: Tensor, reference_N: Tensor | None, kept_K: Tensor) -> None:
        assert reference_N is not None, "storage is compared for runs with a reference"
        valid_N, ratio = batch.valid_bs.flatten(), config.selection.slm_keep_ratio
        exact = kept(loss_N - reference_N, valid_N, ratio)
        assert torch.equal(exact, kept_K), "storage is compared for the excess loss, ranked by micro-batch"
        counts["kept"] += exact.numel()
        for dtype in DTYPES:
            rounded = kept(loss_N - reference_N.to(dtype).float(), valid_N, ratio)
            counts[str(dtype)] += int((~torch.isin(exact, rounded)).sum())

    pretrain(config, observer=observe)
    return counts


if __name__ == "__main__":
    setup_logging()
    totals = main(sys.argv[1:])
    for name in map(str, DTYPES):
        print(f"{name} replaces {100 * totals[name] / totals['kept']:.3f} % of {totals['kept']:,} kept tokens")
