"""Weights by token id in a file, such as those of the tokens' frequencies."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from megatron_slm.errors import ConfigError
from megatron_slm.files import write_durably

TENSOR = "token_weights"
"""Name of the tensor in the file."""


def frequency_weights(count_V: Tensor, power: float) -> Tensor:
    """Return weights that fall with the frequency, `(count / largest count)^-power`, fp32 [V].

    The power-law decay of arXiv 2505.16900: the most frequent token has weight 1, one half as frequent 2^power. A
    token that does not occur counts as one that occurs once.

    Args:
        count_V: occurrences of every token id in a corpus, int64 [V].
        power: 0 weighs all tokens alike.
    """
    count_V = count_V.clamp(min=1).double()
    return (count_V / count_V.max()).pow(-power).float()


def write_token_weights(path: str | Path, weight_V: Tensor) -> None:
    """Write the file of --slm-token-weights atomically.

    Raises:
        ConfigError: a weight is negative or not finite, or the tensor has more than one dimension.
    """
    check_token_weights("weight_V", weight_V)
    write_durably(Path(path), save({TENSOR: weight_V.float().contiguous()}))


def read_token_weights(path: str, vocabulary_size: int | None) -> Tensor:
    """Read the file of --slm-token-weights, fp32 [V].

    Raises:
        ConfigError: the file cannot be read, or its weights are of another vocabulary, negative or not finite.
    """
    flag = "--slm-token-weights"
    try:
        weight_V = load_file(path)[TENSOR].float()
    except (OSError, SafetensorError, KeyError) as error:
        rule = f"be a .safetensors file with the tensor {TENSOR} ({error})"
        raise ConfigError(flag, path, rule, "write it with megatron_slm.write_token_weights") from error
    check_token_weights(f"{flag} {path}", weight_V)
    if vocabulary_size is not None and len(weight_V) != vocabulary_size:
        raise ConfigError(
            f"{flag} {path}: number of weights",
            len(weight_V),
            f"be the vocabulary size of the run, {vocabulary_size}",
            "write one weight for every token id of this run's tokenizer",
        )
    return weight_V


def check_token_weights(field: str, weight_V: Tensor) -> None:
    """Check that weights can be used.

    Raises:
        ConfigError: a weight is negative or not finite, all are 0, or the tensor has more than one dimension.
    """
    if weight_V.dim() != 1:
        raise ConfigError(f"{field}: shape", tuple(weight_V.shape), "have one dimension", "write one weight a token id")
    wrong_V = ~weight_V.isfinite() | (weight_V < 0)
    if bool(wrong_V.any()):
        at = int(wrong_V.nonzero()[0])
        raise ConfigError(
            f"{field}: weight of token {at}", float(weight_V[at]), "be finite and at least 0", "correct it"
        )
    if not bool(weight_V.any()):
        raise ConfigError(f"{field}: largest weight", 0.0, "be above 0", "give at least one token a weight")
