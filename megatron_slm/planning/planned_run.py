"""A run as the planner sees it: its configuration and its models' shapes, without weights or corpora."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.format import Manifest, find_checkpoint
from megatron_slm.config import deepspeed as ds_config
from megatron_slm.config.architecture import Architecture
from megatron_slm.config.resolve import resolve_architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.convert.hf_config import read_architecture
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import CheckpointError, ConfigError, ServiceError, WeightsError
from megatron_slm.flags.load import parse
from megatron_slm.hub import cached_folder, local_path
from megatron_slm.loss.variants import LossHead
from megatron_slm.planning.known_models import KNOWN_MODELS
from megatron_slm.selection.configure import build_selector
from megatron_slm.selection.selector import Selector


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """Configuration, shapes and selection of a run."""

    config: RunConfig
    architecture: Architecture
    reference: Architecture | None
    """None if no reference runs: with CLM, stored scores, or a score without a reference."""
    selector: Selector
    deepspeed: dict[str, Any]
    base: Architecture | None = None
    """Of --reference-base."""

    @property
    def references(self) -> list[Architecture]:
        """The references that run: none, one or two."""
        return [arch for arch in (self.reference, self.base) if arch is not None]

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an element of the models' compute dtype."""
        return 2 if self.config.training.bf16 else 4

    @property
    def keep_ratio(self) -> float:
        """Approximate share of tokens that a step keeps at the end of the run."""
        return self.selector.expected_share(self.config.training.train_iters)

    @property
    def loss_head(self) -> LossHead:
        """Variant of the loss head."""
        return LossHead.from_config(self.config.loss_head, self.config.distillation)

    @property
    def distills_live(self) -> bool:
        """True if the loss has the distribution of a reference that runs."""
        return self.reference is not None and self.config.distillation.distills

    def compiles_blocks(self, *, zero_stage: int, cuts_sequences: bool, recomputes_selectively: bool) -> bool:
        """Tell whether the run compiles its blocks on GPUs."""
        return self.config.backend.compiles_on_gpu(
            zero_stage=zero_stage,
            own_backward=recomputes_selectively or not self.config.backward.is_exact,
            resets_documents=self.config.data.reset_attention_mask or self.config.data.reset_position_ids,
            cuts_sequences=cuts_sequences,
        )

    def padded_vocabulary(self, architecture: Architecture) -> int:
        """Return the number of rows of a model's embedding, over all tensor-parallel ranks."""
        divisor = self.config.model.make_vocab_size_divisible_by
        return ceil_div(architecture.vocab_size, divisor) * divisor


def plan_run(config: RunConfig, *, model_config: str | None = None, reference_config: str | None = None) -> PlannedRun:
    """Determine the shapes of a run's models.

    Args:
        model_config: a config.json, a folder with one, or one of our checkpoints; default: --init-from, or the model's
            flags.
        reference_config: the same for the reference; default: --reference-load, or --reference-config.

    Raises:
        SlmError: a path or a flag cannot be used.
    """
    deepspeed = ds_config.read_json(config.parallel.deepspeed_config)
    ds_config.check(deepspeed, config)
    stored = None
    if model_config is not None:
        stored = architecture_at(model_config, "--model-config")
    elif config.model.init_from is not None and _is_there(config.model.init_from, config.model.num_layers):
        stored = architecture_at(config.model.init_from, "--init-from", instead="--model-config")
    vocab_size = stored.vocab_size if stored else _vocabulary(config)
    architecture = resolve_architecture(config, stored, vocab_size, starts=True)
    selector = build_selector(config.selection, seed=config.training.seed, vocabulary_size=architecture.vocab_size)
    reference = base = None
    if not config.selection.reference_scores:
        if reference_config is not None and config.selection.objective == "slm":
            reference = architecture_at(reference_config, "--reference-config")
        elif (path := config.reference_path) is not None:
            shape = config.selection.reference_config
            if shape is not None and not _is_there(path, shape):
                reference = architecture_at(shape, "--reference-config")
            else:
                reference = architecture_at(path, "--reference-load", instead="--reference-config")
        if config.reference_base_path is not None:
            base = architecture_at(config.reference_base_path, "--reference-base")
    return PlannedRun(
        config=config,
        architecture=architecture,
        reference=reference,
        selector=selector,
        deepspeed=deepspeed,
        base=base,
    )


def _is_there(path: str, otherwise: object) -> bool:
    """Return True if the path exists, is cached from the hub, or there is no other source of the shape."""
    return otherwise is None or Path(path).exists() or cached_folder(path, part="config") is not None


def architecture_at(path: str, field: str, *, instead: str | None = None) -> Architecture:
    """Return the architecture in a config.json, a folder with one, a run's YAML file, or one of our checkpoints, or
    that of a known model's name.

    Args:
        field: flag that names the path, for the error.
        instead: flag that names another source, for the error.

    Raises:
        WeightsError: the path is none of these.
    """
    if (known := KNOWN_MODELS.get(path.lower())) is not None and not Path(path).exists():
        return known
    if Path(path).suffix in (".yaml", ".yml"):
        described, _ = parse(["--config", path])
        return resolve_architecture(described, None, _vocabulary(described))
    try:
        local = local_path(path, field=field, part="config")
    except (ConfigError, ServiceError) as error:
        if instead is None:
            raise
        raise type(error)(error.field, error.value, error.rule, f"{error.fix}; or use {instead}") from error
    folder = local.parent if local.name == "config.json" else local
    if (folder / "config.json").is_file():
        return read_architecture(folder)
    try:
        return Manifest.read(find_checkpoint(folder)).architecture
    except CheckpointError as error:
        fix = f"check the path, or use {instead}" if instead else "check the path"
        rule = (
            "be a config.json, a folder with one, a run's YAML file, one of our checkpoints (weights not needed), or "
            f"one of {', '.join(KNOWN_MODELS)}"
        )
        raise WeightsError(field, path, rule, fix) from error


def _vocabulary(config: RunConfig) -> int:
    data = config.data
    if data.tokenizer_type != "NullTokenizer":
        if data.vocab_size is not None:
            return data.vocab_size
        named = data.tokenizer_model
        if named is None or not (Path(named).exists() or cached_folder(named, part="tokenizer")):
            purpose = "a plan without --init-from and without the tokenizer's files"
            raise ConfigError.missing("--vocab-size", purpose, "give the size of the tokenizer's vocabulary")
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.vocab_size).vocab_size
