"""A run as far as planning needs it: its configuration and the shapes of its models; no weights, no corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.format import Manifest, find_checkpoint
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.load import parse
from megatron_slm.config.resolve import resolve_architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.convert.hf_config import read_architecture
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import CheckpointError, ConfigError, WeightsError
from megatron_slm.loss.variants import LossHead
from megatron_slm.selection.configure import build_selector
from megatron_slm.selection.selector import Selector


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned."""

    config: RunConfig
    architecture: Architecture
    reference: Architecture | None
    """None where no reference runs: CLM, a score that needs none, or stored scores."""
    selector: Selector
    deepspeed: dict[str, Any]

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number that the models compute in."""
        return 2 if self.config.training.bf16 else 4

    @property
    def keep_ratio(self) -> float:
        """Share of the tokens that a step keeps at the end of the run, about."""
        return self.selector.expected_share(self.config.training.train_iters)

    @property
    def loss_head(self) -> LossHead:
        """How the loss is computed."""
        return LossHead.from_config(self.config.loss_head)

    def padded_vocabulary(self, architecture: Architecture) -> int:
        """Rows of a model's embedding over all tensor-parallel ranks."""
        divisible = self.config.model.make_vocab_size_divisible_by
        return -(-architecture.vocab_size // divisible) * divisible


def open_job(config: RunConfig, *, model_config: str | None = None, reference_config: str | None = None) -> Job:
    """Find the shapes of a run's models.

    Args:
        model_config: a config.json, a folder with one, or one of our checkpoints; default: --init-from, else flags.
        reference_config: the same of the reference; default: --reference-load, else the configuration's.

    Raises:
        SlmError: with the field, the value, the rule and the fix.
    """
    deepspeed = ds_config.read_json(config.parallel.deepspeed_config)
    ds_config.check(deepspeed, config)
    stored = None
    if model_config is not None:
        stored = architecture_at(model_config, "--model-config")
    elif config.model.init_from is not None and _is_there(config.model.init_from, config.model.num_layers):
        stored = architecture_at(config.model.init_from, "--init-from", instead="--model-config")
    vocab_size = stored.vocab_size if stored else _vocabulary(config)
    architecture = resolve_architecture(config, stored, vocab_size)
    selector = build_selector(config.selection, seed=config.training.seed, vocabulary_size=architecture.vocab_size)
    reference = None
    if not config.selection.reference_scores:
        if reference_config is not None and config.selection.objective == "slm":
            reference = architecture_at(reference_config, "--reference-config")
        elif config.selection.reference_load is not None:
            path, shape = config.selection.reference_load, config.selection.reference_config
            if shape is not None and not _is_there(path, shape):
                reference = architecture_at(shape, "--reference-config")
            else:
                reference = architecture_at(path, "--reference-load", instead="--reference-config")
    return Job(config=config, architecture=architecture, reference=reference, selector=selector, deepspeed=deepspeed)


def _is_there(path: str, otherwise: object) -> bool:
    """Whether to look at a path: it exists, or there is nothing else that says the shape."""
    return otherwise is None or Path(path).exists()


def architecture_at(path: str, field: str, *, instead: str | None = None) -> Architecture:
    """The architecture that a config.json, a folder with one, a run's YAML file, or one of our checkpoints describes.

    Args:
        instead: the flag that names another place, for the error where there is nothing at this one.

    Raises:
        WeightsError: there is none of them.
    """
    place = Path(path)
    if place.suffix in (".yaml", ".yml"):
        described, _ = parse(["--config", path])
        return resolve_architecture(described, None, _vocabulary(described))
    folder = place.parent if place.name == "config.json" else place
    if (folder / "config.json").is_file():
        return read_architecture(folder)
    try:
        return Manifest.read(find_checkpoint(folder)).architecture
    except CheckpointError as error:
        fix = f"check the path, or give {instead}" if instead else "check the path"
        rule = "is a config.json, a folder with one, a run's YAML file, or one of our checkpoints (no weights needed)"
        raise WeightsError(field, path, rule, fix) from error


def _vocabulary(config: RunConfig) -> int:
    data = config.data
    if data.tokenizer_type == "NullTokenizer" or data.vocab_size is None:
        if data.tokenizer_type != "NullTokenizer" and (
            data.tokenizer_model is None or not Path(data.tokenizer_model).exists()
        ):
            raise ConfigError(
                "--vocab-size",
                None,
                "is given where neither --init-from nor a tokenizer that is here says it",
                "give the number of tokens of the run's tokenizer",
            )
        return build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.vocab_size).vocab_size
    return data.vocab_size
