"""Selective Language Modeling at scale: train on the tokens worth learning.

The names below are the public Python API (docs/reference/python.md). Each is imported on first use, so that importing
the package costs neither torch nor DeepSpeed. `__init__.pyi` has their types.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "api.causal_lm": ("CausalLMLoss", "make_selector", "micro_batch", "selective_loss", "token_losses"),
    "api.hugging_face": ("ReferenceLossCollator", "SlmTrainer", "SlmTrainerMixin", "with_reference_losses"),
    "api.runs": ("FinishedRun", "make_config", "open_scores", "score", "train"),
    "config.run": ("RunConfig",),
    "data.corpus.columns": ("ColumnWriter",),
    "data.corpus.indexed": ("IndexedCorpus",),
    "data.corpus.indexed_writer": ("IndexedCorpusWriter",),
    "errors": ("SlmError",),
    "loss.selective_ce": ("SelectiveLoss", "selective_cross_entropy"),
    "loss.variants": ("LossHead",),
    "reference.store": ("ScoreReader",),
    "selection.scores": ("score_named",),
    "selection.select": ("top_share",),
    "selection.selector": ("Selector",),
    "selection.token_weights": ("frequency_weights", "write_token_weights"),
    "selection.weights": ("weight_named",),
    "types": ("MicroBatch", "Selection", "TokenStatistics"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name in (renamed := importlib.import_module(f"{__name__}.deprecation")).NAMES:
        return __getattr__(renamed.current_name(name, renamed.NAMES[name], kind="name"))
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
