"""The section of a run's configuration that says what the machines must be like before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What is asked of the nodes and the links between them, by --preflight and tools/preflight.py."""

    preflight: bool = False
    """Compare the nodes and measure the links between them before anything is loaded; end the run if a check fails."""
    preflight_strict: bool = False
    """Warnings fail too."""
    min_bandwidth_gbps: float | None = None
    """Least bandwidth of every link between two nodes, in Gbit/s in each direction; default: no least one."""
    slow_link_share: float = 0.5
    """A link below this share of the median of its kind (between nodes, within nodes) is named as slow."""
    preflight_link_seconds: float = 0.5
    """Time for each direction of a link, about; links that share no node are measured at once."""
    max_clock_skew_seconds: float = 1.0
    """Largest difference between the clocks of two nodes."""
    min_shm_mib: int = 512
    """Least size of /dev/shm, in MiB; containers often have 64."""
    min_open_files: int = 4096
    """Least number of files that a process may have open (ulimit -n)."""
    min_free_gpu_share: float = 0.9
    """Least share of each GPU's memory that is free."""

    def __post_init__(self) -> None:
        for name in ("min_bandwidth_gbps", "preflight_link_seconds", "max_clock_skew_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError("--" + name.replace("_", "-"), value, "is greater than 0", "give a positive number")
        for name in ("slow_link_share", "min_free_gpu_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError("--" + name.replace("_", "-"), value, "lies in [0, 1]", "give a share such as 0.5")
