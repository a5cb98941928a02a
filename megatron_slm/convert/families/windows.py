"""Sliding windows of some blocks, as transformers lists them (`layer_types`)."""

from __future__ import annotations

from typing import Any

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import LayoutError

FULL, SLIDING = "full_attention", "sliding_attention"


def unsupported(config: Any, name: str, rule: str) -> LayoutError:
    """Return the error for a field of a configuration that no `Architecture` has."""
    return LayoutError(name, getattr(config, name), rule, "use another model")


def window_options(config: Any) -> dict[str, Any]:
    """Return the fields of an `Architecture` for a configuration's `layer_types` and `sliding_window`.

    Raises:
        LayoutError: the blocks' kinds follow no pattern that an `Architecture` has.
    """
    kinds = list(config.layer_types)
    if all(kind == FULL for kind in kinds):
        return {}
    num_first = next(index for index, kind in enumerate(kinds) if kind != FULL)
    if config.sliding_window is not None and kinds == [FULL] * num_first + [SLIDING] * (len(kinds) - num_first):
        return {"sliding_window": config.sliding_window, "full_attention_layers": num_first}
    interval = kinds.index(FULL) + 1 if FULL in kinds else 0
    every_nth = [FULL if interval and (index + 1) % interval == 0 else SLIDING for index in range(len(kinds))]
    if config.sliding_window is not None and kinds == every_nth:
        return {"sliding_window": config.sliding_window, "full_attention_interval": interval}
    rule = "be full_attention throughout, first or at every n-th block, else sliding_attention with a sliding_window"
    raise unsupported(config, "layer_types", rule)


def layer_types(arch: Architecture) -> list[str]:
    """Inverse of `window_options`: the kind of every block."""
    return [FULL if arch.window_of(index) is None else SLIDING for index in range(arch.num_layers)]
