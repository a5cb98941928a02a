"""The state of a run: everything that changes from step to step and that a resumed run continues from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

if TYPE_CHECKING:  # listing checkpoints needs no torch
    from torch import Tensor

    from megatron_slm.loss.sums import LossSums

_TENSOR = {"in_manifest": False}
"""Metadata of a field that is too large for JSON and is saved in a file of its own."""
_OPTIONAL = {"only_where_set": True}
"""Metadata of a field that the manifest leaves out where it is empty, so that earlier versions can read it."""


@dataclass(kw_only=True)
class RunState:
    """Progress of a run, the same on every rank; `Saver` saves it, `load_state` loads it.

    A new field of JSON values needs a default and nothing else: it is saved under its own name in the manifest and
    restored from there; checkpoints without it restore the default.
    """

    step: int = 0
    """Finished steps, skipped ones included."""
    consumed_samples: int = 0
    adam_step: int = 0
    """Optimizer steps applied: finished steps less the skipped ones."""
    score_threshold: float | None = None
    """Running threshold of --slm-policy quantile; None before the first step and with other policies."""
    keep_adaptation: list[float] = field(default_factory=list, metadata=_OPTIONAL)
    """Keep ratio of the next step and the loss that it came from, with --slm-keep-adaptation; else empty."""
    tokens_seen: int | None = 0
    """Valid tokens of all applied steps; None after resuming from a checkpoint without a count."""
    tokens_kept: int | None = 0
    """Tokens of these that were trained on."""
    recent_losses: list[float] = field(default_factory=list)
    """Mean losses of the last steps in nats, for the detection of loss spikes; empty where it is off."""
    row_shares: list[int] = field(default_factory=list, metadata=_OPTIONAL)
    """Sixteenths of the rows in each block's backward pass; empty without --backward-row-variance."""
    probe_kept: Tensor | None = field(default=None, compare=False, metadata=_TENSOR)
    """Tokens that the last selection probe kept, bool [samples, s]; None before the first probe."""

    @property
    def keep_ratio(self) -> float | None:
        """Keep ratio of the next step with --slm-keep-adaptation; None before its first step, and without it."""
        return self.keep_adaptation[0] if self.keep_adaptation else None

    @property
    def skipped_steps(self) -> int:
        """Steps so far that were not applied."""
        return self.step - self.adam_step

    def advance(self, num_samples: int, applied: LossSums | None) -> None:
        """Move past a step.

        Args:
            num_samples: samples of its global batch.
            applied: its sums over all ranks; None where the step was skipped.
        """
        self.step += 1
        self.consumed_samples += num_samples
        if applied is None:
            return
        self.adam_step += 1
        if self.tokens_seen is not None and self.tokens_kept is not None:
            self.tokens_seen += round(applied.valid_tokens)
            self.tokens_kept += round(applied.kept_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that the manifest holds, by name."""
        optional = {f.name for f in fields(self) if f.metadata.get("only_where_set")}
        values = {name: getattr(self, name) for name in _manifest_fields(type(self))}
        return {name: value for name, value in values.items() if value or name not in optional}

    @classmethod
    def take_from(cls, values: dict[str, Any]) -> Self:
        """Build the state from a manifest's values and remove its fields from them."""
        return cls(**{name: values.pop(name) for name in _manifest_fields(cls) if name in values})


def _manifest_fields(kind: type[RunState]) -> list[str]:
    return [f.name for f in fields(kind) if f.metadata.get("in_manifest", True)]
