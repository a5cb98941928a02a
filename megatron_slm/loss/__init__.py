"""Token losses without a table of all logits, and the gradient of the kept tokens only."""

from megatron_slm.loss.selective_ce import SelectiveLoss, selective_cross_entropy, token_statistics
from megatron_slm.loss.variants import LossHead

__all__ = ["LossHead", "SelectiveLoss", "selective_cross_entropy", "token_statistics"]
