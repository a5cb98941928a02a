"""Selective Language Modeling at scale: train on the tokens worth learning.

The names below are the public Python API (docs/reference/python.md). Each is imported on first use, so that importing
the package costs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_slm.api.causal_lm import CausalLMLoss as CausalLMLoss
    from megatron_slm.api.causal_lm import make_selector as make_selector
    from megatron_slm.api.causal_lm import micro_batch as micro_batch
    from megatron_slm.api.causal_lm import selective_loss as selective_loss
    from megatron_slm.api.causal_lm import token_losses as token_losses
    from megatron_slm.api.hugging_face import ReferenceLossCollator as ReferenceLossCollator
    from megatron_slm.api.hugging_face import SlmTrainer as SlmTrainer
    from megatron_slm.api.hugging_face import SlmTrainerMixin as SlmTrainerMixin
    from megatron_slm.api.hugging_face import with_reference_losses as with_reference_losses
    from megatron_slm.api.runs import FinishedRun as FinishedRun
    from megatron_slm.api.runs import make_config as make_config
    from megatron_slm.api.runs import open_scores as open_scores
    from megatron_slm.api.runs import score as score
    from megatron_slm.api.runs import train as train
    from megatron_slm.config.run import RunConfig as RunConfig
    from megatron_slm.data.corpus.indexed import IndexedCorpus as IndexedCorpus
    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter as IndexedCorpusWriter
    from megatron_slm.errors import SlmError as SlmError
    from megatron_slm.loss.selective_ce import SelectiveLoss as SelectiveLoss
    from megatron_slm.loss.selective_ce import selective_cross_entropy as selective_cross_entropy
    from megatron_slm.loss.variants import LossHead as LossHead
    from megatron_slm.reference.store import ScoreReader as ScoreReader
    from megatron_slm.selection.scores import score_named as score_named
    from megatron_slm.selection.select import top_share as top_share
    from megatron_slm.selection.selector import Selector as Selector
    from megatron_slm.types import MicroBatch as MicroBatch
    from megatron_slm.types import Selection as Selection
    from megatron_slm.types import TokenStatistics as TokenStatistics

_MODULES = {
    "api.causal_lm": ("CausalLMLoss", "make_selector", "micro_batch", "selective_loss", "token_losses"),
    "api.hugging_face": ("ReferenceLossCollator", "SlmTrainer", "SlmTrainerMixin", "with_reference_losses"),
    "api.runs": ("FinishedRun", "make_config", "open_scores", "score", "train"),
    "config.run": ("RunConfig",),
    "data.corpus.indexed": ("IndexedCorpus",),
    "data.corpus.indexed_writer": ("IndexedCorpusWriter",),
    "errors": ("SlmError",),
    "loss.selective_ce": ("SelectiveLoss", "selective_cross_entropy"),
    "loss.variants": ("LossHead",),
    "reference.store": ("ScoreReader",),
    "selection.scores": ("score_named",),
    "selection.select": ("top_share",),
    "selection.selector": ("Selector",),
    "types": ("MicroBatch", "Selection", "TokenStatistics"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
