"""Whole runs from Python: configure, train, score, and read stored scores.

The process joins the world that its launcher made (`deepspeed`, `torchrun`, srun); without one it is a world of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.cli.command import choose_accelerator
from megatron_slm.config.rules import flag
from megatron_slm.config.run import RunConfig
from megatron_slm.config.scoring import ScoreDtype, ScoringOptions
from megatron_slm.flags.load import parse
from megatron_slm.reference.manifest import StoreManifest
from megatron_slm.reference.store import ScoreReader


class FinishedRun(NamedTuple):
    """Result of `train`."""

    run_dir: Path
    """Folder with metrics.jsonl, config.yaml, tensorboard/ and, if the run saves, checkpoints/."""
    step: int
    """Optimizer steps done, those of earlier starts included."""
    tokens_kept: int | None
    """Tokens trained on; None after resuming from a checkpoint without a count."""


def make_config(config: str | Path | Mapping[str, Any] | None = None, **flags: Any) -> RunConfig:
    """Return a validated configuration, by the names of the flags.

    Args:
        config: a YAML file, or a mapping of flag names to values.
        flags: flags with underscores, which override `config`: `make_config("run.yaml", lr=1e-4)`.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type or out of range.
    """
    words = ["--config", str(config)] if isinstance(config, (str, Path)) else []
    given = config if isinstance(config, Mapping) else {}
    for typed, value in {flag(name): value for name, value in [*given.items(), *flags.items()]}.items():
        words += _words(typed, value)
    return parse(words)[0]


def _words(typed: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [typed if value else "--no-" + typed[2:]]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [typed, *map(str, value)]
    return [f"{typed}={value}"]


def train(config: RunConfig | str | Path | Mapping[str, Any], **flags: Any) -> FinishedRun:
    """Train as `slm-pretrain` does. Collective over the world.

    Args:
        config: a configuration, a YAML file, or a mapping of flag names to values.
        flags: see `make_config`.

    Raises:
        SlmError: on every rank, before the first step if it can be known by then.
    """
    run_config = config if isinstance(config, RunConfig) else make_config(config, **flags)
    choose_accelerator()
    from megatron_slm.training.pretrain import pretrain

    state = pretrain(run_config).state
    return FinishedRun(Path(run_config.logging.run_dir), state.step, state.tokens_kept)


def score(
    config: RunConfig | str | Path | Mapping[str, Any],
    *,
    output: str | Path,
    score_dtype: ScoreDtype = "float32",
    with_entropy: bool = False,
    **flags: Any,
) -> StoreManifest:
    """Store a reference's losses as `slm-score` does. Collective over the world.

    Args:
        config: the configuration of the run that will read the store, with `reference_load`.
        output: the store's folder.
        score_dtype: data type of the stored losses.
        with_entropy: store entropies too.
        flags: see `make_config`.

    Raises:
        SlmError: on every rank, before the first forward pass if it can be known by then.
    """
    run_config = config if isinstance(config, RunConfig) else make_config(config, **flags)
    choose_accelerator()
    from megatron_slm.scoring import run as scoring_run

    options = ScoringOptions(output=str(output), score_dtype=score_dtype, with_entropy=with_entropy)
    return scoring_run.score(run_config, options)


def open_scores(folder: str | Path) -> ScoreReader:
    """Open a store of reference scores; `read(batch)` returns the losses of a micro-batch by sample number.

    Raises:
        ScoreStoreError: no store, or a damaged manifest.
    """
    return ScoreReader(Path(folder), StoreManifest.read(Path(folder)))
