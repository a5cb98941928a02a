"""The configuration of a run: all sections.

Fields have Megatron-LM's flag names where it has the flag. `__post_init__` checks a section by itself and does no
input or output; `run/plan.py` checks what depends on files or the world, before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.backends import BackendConfig
from megatron_slm.config.backward import BackwardConfig
from megatron_slm.config.checkpoint import CheckpointConfig
from megatron_slm.config.data import DataConfig
from megatron_slm.config.health import HealthConfig
from megatron_slm.config.logging import LoggingConfig
from megatron_slm.config.loss_head import LossHeadConfig
from megatron_slm.config.model import ModelConfig
from megatron_slm.config.optimizer import OptimizerConfig, TrainingConfig
from megatron_slm.config.parallel import ParallelConfig
from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.config.resilience import ResilienceConfig
from megatron_slm.config.rules import require
from megatron_slm.config.selection import SelectionConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    selection: SelectionConfig
    loss_head: LossHeadConfig
    backward: BackwardConfig
    backend: BackendConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    health: HealthConfig
    logging: LoggingConfig
    resilience: ResilienceConfig
    preflight: PreflightConfig

    def __post_init__(self) -> None:
        if self.checkpoint.keep_best is not None:
            saves, evaluates = self.checkpoint.save_interval, self.logging.eval_interval
            require(
                saves is not None and evaluates is not None and saves % evaluates == 0,
                self.checkpoint,
                "keep_best",
                "have an evaluation at every checkpoint",
                f"make --save-interval ({saves}) a multiple of --eval-interval ({evaluates})",
            )

    @property
    def save_folder(self) -> str:
        """Folder of the run's checkpoints."""
        return self.checkpoint.save or f"{self.logging.run_dir}/checkpoints"
