"""What a run is told: one frozen dataclass per section, and how they are read."""

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import BackendConfig
from megatron_slm.config.backward import BackwardConfig
from megatron_slm.config.checkpoint import CheckpointConfig
from megatron_slm.config.data import DataConfig
from megatron_slm.config.logging import LoggingConfig
from megatron_slm.config.loss_head import LossHeadConfig
from megatron_slm.config.model import ModelConfig
from megatron_slm.config.optimizer import OptimizerConfig, TrainingConfig
from megatron_slm.config.parallel import ParallelConfig
from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.config.run import RunConfig
from megatron_slm.config.selection import SelectionConfig

__all__ = [
    "Architecture",
    "BackendConfig",
    "BackwardConfig",
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
