"""What a run is told: one frozen dataclass per section, and how they are read."""

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import BackendConfig
from megatron_slm.config.data import DataConfig
from megatron_slm.config.logging import LoggingConfig
from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.config.sections import (
    CheckpointConfig,
    LossHeadConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SelectionConfig,
    TrainingConfig,
)

__all__ = [
    "Architecture",
    "BackendConfig",
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "LossHeadConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreflightConfig",
    "RunConfig",
    "SelectionConfig",
    "TrainingConfig",
]
