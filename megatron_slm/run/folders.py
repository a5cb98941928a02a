"""Checks what a run is going to write, without writing it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_slm.checkpoint.save import check_save_folder
from megatron_slm.config.run import RunConfig
from megatron_slm.data.tokenizers.registry import Tokenizer
from megatron_slm.errors import ConfigError, os_errors_as
from megatron_slm.files import check_writable
from megatron_slm.run.resume import Resume
from megatron_slm.telemetry.monitors import board_folder


def check_folders(config: RunConfig, tokenizer: Tokenizer, monitors: dict[str, Any], resume: Resume | None) -> None:
    """Check that a run can write its folders and its tokenizer, and overwrites no other run's checkpoints.

    Args:
        monitors: sections of the DeepSpeed JSON.

    Raises:
        ConfigError: the run's folder or TensorBoard's cannot be written.
        CheckpointError: see `check_save_folder`.
        VocabularyError: the tokenizer has no Hugging Face form, which checkpoints contain.
    """
    run_dir = Path(config.logging.run_dir)
    named = {"--run-dir": run_dir, "DeepSpeed JSON: tensorboard.output_path": board_folder(monitors, run_dir)}
    for field, folder in named.items():
        with os_errors_as(ConfigError, field, str(folder), "be a writable folder", "choose another"):
            check_writable(folder)
    if config.checkpoint.enabled:
        start, damaged = (resume.manifest.step, resume.damaged) if resume is not None else (0, ())
        check_save_folder(Path(config.save_folder), start, damaged)
    if config.data.tokenizer_type != "NullTokenizer":
        with TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
