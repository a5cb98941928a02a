"""The corpora that a configuration names."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.blends import Blend, NamedPrefix, is_number, named_prefix, parse_blend, parse_phases
from megatron_slm.config.data import DataConfig
from megatron_slm.data.corpus.indexed import idx_path
from megatron_slm.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """Corpora of the training, validation and test sets, by flag or by the file a flag names."""

    train: Blend
    valid: tuple[NamedPrefix, ...]
    test: tuple[NamedPrefix, ...]
    split: str | None
    """--split of the training corpora; None where all their sequences are for training."""


def named_corpora(data: DataConfig) -> list[NamedPrefix]:
    """List every corpus that a run names for any of its sets and phases, each once.

    Raises:
        ConfigError: no training corpus is named, or a file that names corpora cannot be read.
    """
    paths = read_paths(data)
    blends = [paths.train, *(phase.blend for phase in parse_phases(data.data_phases))]
    named = [corpus for blend in blends for corpus in blend.corpora]
    return list({corpus.prefix: corpus for corpus in (*named, *paths.valid, *paths.test)}.values())


def read_paths(data: DataConfig) -> DataPaths:
    """Read the corpora of all sets from the flags.

    Raises:
        ConfigError: no training corpus is named, or a file that names corpora cannot be read.
    """
    valid, test = data.valid_data_path, data.test_data_path
    words, flag, split = data.data_path, "--data-path", data.split
    if data.train_data_path:
        words, flag, split = data.train_data_path, "--train-data-path", ""
    elif data.data_args_path:
        words, flag = _read(data.data_args_path, "--data-args-path").split(), "--data-args-path"
    elif data.per_split_data_args_path:
        flag, split = "--per-split-data-args-path", ""
        words, valid, test = _read_sets(data.per_split_data_args_path, flag)
    train = parse_blend(words, flag)
    _warn_of_numeric_prefixes(words, flag, train)
    return DataPaths(
        train=train,
        valid=_without_weights(valid, "--valid-data-path"),
        test=_without_weights(test, "--test-data-path"),
        split=split or None,
    )


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(flag, path, f"be a readable file ({error})", "check the path") from error


def _read_sets(path: str, flag: str) -> tuple[list[str], list[str], list[str]]:
    try:
        found = json.loads(_read(path, flag))
        if not all(value is None or isinstance(value, list) for value in found.values()):
            raise TypeError("a value is not a list")
        sets = [[str(word) for word in found.get(name) or []] for name in ("train", "valid", "test")]
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(flag, path, f"be a JSON object of lists ({error})", "see --help") from error
    unknown = sorted(set(found) - {"train", "valid", "test"})
    if unknown:
        raise ConfigError(f"{flag} {path}: key", unknown[0], "be train, valid or test", "rename the key")
    return sets[0], sets[1], sets[2]


def _warn_of_numeric_prefixes(words: list[str], flag: str, train: Blend) -> None:
    """Warn where words that were read as weights are also prefixes of corpora."""
    if train.weights is None:
        return
    for word in words[::2]:
        if idx_path(word).is_file():
            logger.warning(
                "%s: %s was read as a weight, and a corpus of that name exists; write ./%s for the corpus",
                flag, word, word,
            )  # fmt: skip


def _without_weights(words: list[str], flag: str) -> tuple[NamedPrefix, ...]:
    if not words:
        return ()
    if len(words) % 2 == 0 and is_number(words[0]):
        logger.warning("%s: weights are ignored, since each held-out corpus is evaluated by itself", flag)
        return parse_blend(words, flag).corpora
    return tuple(named_prefix(word) for word in words)
