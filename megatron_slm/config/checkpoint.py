"""Saving, loading and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = None
    """Folder for checkpoints (default with --save-interval: RUN_DIR/checkpoints); one is written at the end."""
    save_interval: int | None = None
    """Save every this many steps, and at the end."""
    async_save: bool = False
    """Go on training while a copy of the state is written; it takes as much host memory as the rank's files."""
    keep_last: int | None = None
    """Delete checkpoints but for this many newest ones, once a newer one is committed; default: delete none."""
    save_retain_interval: int | None = None
    """With --keep-last: keep those of every this many steps too."""
    keep_best: str | None = None
    """With --keep-last: keep the one with the lowest loss of this held-out set too; --save-interval must be a
    multiple of --eval-interval, so that each has a loss."""
    load: str | None = None
    """Resume from the newest complete checkpoint in this folder (or from this checkpoint), of any layout. The folder
    that the run saves to may hold none yet: the run then starts afresh, so that one command starts and resumes."""
    exit_on_missing_checkpoint: bool = False
    """End the run if --load finds no checkpoint, also in the folder that the run saves to."""
    load_fallback: bool = False
    """Where the newest checkpoint in --load is damaged, take the newest one that is not."""
    load_checksums: Literal["small", "all", "none"] = "small"
    """Files of --load whose checksums are compared: those up to 256 MiB, all, or none; sizes always are."""
    accept_new_sample_order: bool = False
    """Resume although the samples so far would be others (other corpus, --seed, --split or --seq-length); orders that
    were begun are then laid out anew, and samples may repeat or be left out."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", "keep_last", "save_retain_interval")
        for name in ("save_retain_interval", "keep_best"):
            require(
                getattr(self, name) is None or self.keep_last is not None,
                name,
                getattr(self, name),
                "is an exception from --keep-last, without which nothing is deleted",
                "add --keep-last, or leave it out",
            )
        for name in ("exit_on_missing_checkpoint", "load_fallback"):
            require(self.load is not None or not getattr(self, name), name, True, "goes with --load", "add --load")

    @property
    def enabled(self) -> bool:
        """Whether the run writes checkpoints at all."""
        return self.save is not None or self.save_interval is not None
