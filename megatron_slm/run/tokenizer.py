"""Opens the tokenizer of a run."""

from __future__ import annotations

from megatron_slm.config.run import RunConfig
from megatron_slm.convert.source import Model, open_model
from megatron_slm.data.tokenizers.registry import Tokenizer, build_tokenizer
from megatron_slm.errors import ConfigError


def open_if_named(path: str | None, field: str, *, checksums: bool, share: tuple[int, int] = (0, 1)) -> Model | None:
    """Open the model at `path` (see `open_model`); None without a path."""
    return None if path is None else open_model(path, field=field, checksums=checksums, share=share)


def open_run_tokenizer(config: RunConfig) -> Tokenizer:
    """Open a run's tokenizer without keeping its models.

    Raises:
        ConfigError: see `open_tokenizer`.
    """
    return open_tokenizer(config, open_if_named(config.model.init_from, "--init-from", checksums=False))


def open_tokenizer(config: RunConfig, init: Model | None) -> Tokenizer:
    """Open a run's tokenizer: --tokenizer-model, else the one in --init-from.

    Raises:
        ConfigError: there is neither, or it cannot be read.
    """
    data = config.data
    model = data.tokenizer_model
    if model is None and init is not None and init.tokenizer_folder is not None:
        model = str(init.tokenizer_folder)
    if model is None and data.tokenizer_type != "NullTokenizer":
        raise ConfigError.missing(
            "--tokenizer-model",
            f"--tokenizer-type {data.tokenizer_type}, without a tokenizer in --init-from",
            "name the tokenizer folder or file that the corpus was made with",
        )
    tokenizer = build_tokenizer(data.tokenizer_type, model, data.vocab_size)
    if data.vocab_size not in (None, tokenizer.vocab_size) and data.tokenizer_type != "NullTokenizer":
        raise ConfigError(
            "--vocab-size", data.vocab_size, f"be the tokenizer's, {tokenizer.vocab_size}", "correct it or leave it out"
        )
    return tokenizer
