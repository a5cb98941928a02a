"""Configuration of saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_slm.config.rules import flag, require_given, require_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save: str | None = None
    """Folder for checkpoints; with it, the run also saves at its end. Default: RUN_DIR/checkpoints with
    --save-interval, else no checkpoints."""
    save_interval: int | None = None
    """Save every this many steps, and at the end."""
    async_save: bool = False
    """Write checkpoints in the background from a copy of the state, which takes as much host memory as the rank's
    files."""
    keep_last: int | None = None
    """Number of newest checkpoints to keep; older ones are deleted after each save. Default: keep all."""
    save_retain_interval: int | None = None
    """With --keep-last: also keep checkpoints at multiples of this many steps."""
    keep_best: str | None = None
    """With --keep-last: also keep the checkpoint with the lowest loss on this held-out set. --save-interval must be
    a multiple of --eval-interval."""
    load: str | None = None
    """Resume from the newest complete checkpoint in this folder, or from this checkpoint, saved at any layout. If the
    folder is also the save folder and has no checkpoint yet, the run starts from scratch, so that one command both
    starts and resumes."""
    exit_on_missing_checkpoint: bool = False
    """With --load: exit if there is no checkpoint, even in the run's own save folder."""
    load_fallback: bool = False
    """With --load: if the newest checkpoint is damaged, resume from the newest intact one."""
    load_checksums: Literal["small", "all", "none"] = "small"
    """Files of the loaded checkpoint to verify by checksum: small (up to 256 MiB), all or none. Sizes are always
    verified."""
    accept_new_sample_order: bool = False
    """Resume even if the order of samples changed (another corpus, --seed, --split or --seq-length). Samples may then
    repeat or be skipped."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", "keep_last", "save_retain_interval")
        for name in ("save_retain_interval", "keep_best"):
            if getattr(self, name) is not None:
                require_given(self.keep_last is not None, "keep_last", flag(name), f"add it, or remove {flag(name)}")
        for name in ("exit_on_missing_checkpoint", "load_fallback"):
            if getattr(self, name):
                require_given(self.load is not None, "load", flag(name), f"add it, or remove {flag(name)}")

    def without_saving(self) -> CheckpointConfig:
        """Return the configuration of a run that loads and writes no checkpoints."""
        return replace(self, save=None, save_interval=None, keep_last=None, save_retain_interval=None, keep_best=None)

    @property
    def enabled(self) -> bool:
        """True if the run writes checkpoints."""
        return self.save is not None or self.save_interval is not None
