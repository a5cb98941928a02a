"""Configuration of the preflight checks of nodes and links."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Checks of the nodes and the links between them, by --preflight and tools/preflight.py."""

    preflight: bool = False
    """Compare the nodes and measure the links between them before loading anything; exit if a check fails."""
    preflight_strict: bool = False
    """Treat warnings as failures."""
    min_bandwidth_gbps: float | None = None
    """Least bandwidth of every link between two nodes, in Gbit/s per direction. Default: no limit."""
    slow_link_share: float = 0.5
    """Report links slower than this share of the median of their kind (between nodes, within nodes)."""
    preflight_link_seconds: float = 0.5
    """Approximate measuring time per direction of a link, in seconds. Links without a common node are measured
    concurrently."""
    max_clock_skew_seconds: float = 1.0
    """Largest difference between the clocks of two nodes, in seconds."""
    min_shm_mib: int = 512
    """Least size of /dev/shm, in MiB; containers often have 64."""
    min_open_files: int = 4096
    """Least limit of open files per process (ulimit -n)."""
    min_free_gpu_share: float = 0.9
    """Least free share of each GPU's memory."""

    def __post_init__(self) -> None:
        require_positive(self, "min_bandwidth_gbps", "preflight_link_seconds", "max_clock_skew_seconds")
        for name in ("slow_link_share", "min_free_gpu_share"):
            require(0 <= getattr(self, name) <= 1, self, name, "be in [0, 1]", "use a share such as 0.5")
