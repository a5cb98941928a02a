"""Flags of a selection: what is read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.selection import SelectionConfig
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse, write_yaml
from megatron_slm.selection.configure import build_selector

BASE = ["--train-iters", "3"]
TWO = ["--slm-score", "reference-loss", "reference-entropy"]


@pytest.mark.parametrize(
    ("argv", "scores"),
    [
        (["--slm-score", "loss"], ["loss"]),
        (["--slm-score=-loss"], ["-loss"]),
        (["--slm-score", "-loss"], ["-loss"]),
        (["--slm-score=-loss", "random", "--slm-combine=union"], ["-loss", "random"]),
        (["--slm_score", "random", "-loss", "--slm-combine", "union"], ["random", "-loss"]),
    ],
)
def test_scores_on_the_command_line(argv: list[str], scores: list[str]) -> None:
    assert parse([*BASE, *argv])[0].selection.slm_score == scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slm-score: -loss", {"slm_score": ["-loss"]}),
        ("slm-score: [-loss, excess]\nslm-combine: sum", {"slm_score": ["-loss", "excess"]}),
        ("slm-always-keep: 5\nslm-never-keep: [6, 7]", {"slm_always_keep": [5], "slm_never_keep": [6, 7]}),
        ("slm_always_keep: 5 6", {"slm_always_keep": [5, 6]}),
    ],
)
def test_scores_and_ids_in_yaml(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    selection = parse([*BASE, "--config", str(tmp_path / "run.yaml")])[0].selection
    assert {name: getattr(selection, name) for name in expected} == expected


def test_the_written_configuration_repeats_a_selection(tmp_path: Path) -> None:
    config, _ = parse(
        [*BASE, "--slm-score=-loss", "entropy", "--slm-combine", "sum", "--slm-combine-weights", "1", "-0.5",
         "--slm-always-keep", "3", "4", "--slm-policy", "sample"]
    )  # fmt: skip
    assert config.selection.slm_combine_weights == [1.0, -0.5]
    write_yaml(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (
            ["--slm-score", "loss", "loss", "--slm-combine", "sum"],
            "--slm-score is .*must name one or more scores, each once",
        ),
        (["--slm-score", "exces"], r"--slm-score is 'exces': must be one of .*did you mean excess\?"),
        (
            ["--slm-combine", "sum"],
            r"--slm-combine is 'sum': must be used with two or more scores \(--slm-score is excess",
        ),
        (TWO, "--slm-combine is missing: required by --slm-score with several scores"),
        ([*TWO, "--slm-combine", "average"], "--slm-combine"),
        (
            [*TWO, "--slm-combine", "union", "--slm-combine-ratios", "0.7"],
            "must contain one number for each of the 2 scores",
        ),
        ([*TWO, "--slm-combine", "union", "--slm-combine-ratios", "0.7", "1.2"], r"-ratios is .*must be in \(0, 1\]"),
        (
            [*TWO, "--slm-combine", "sum", "--slm-combine-ratios", "0.7", "0.7"],
            "must be used with --slm-combine intersection or",
        ),
        ([*TWO, "--slm-combine", "union", "--slm-combine-weights", "1", "1"], "must be used with --slm-combine sum"),
        (
            [*TWO, "--slm-combine", "sum", "--slm-combine-weights", "1"],
            "must contain one number for each of the 2 scores",
        ),
        (
            [*TWO, "--slm-combine", "sum", "--slm-combine-weights", "0", "0"],
            "must be finite, with at least one above 0",
        ),
        (
            [*TWO, "--slm-combine", "sum", "--slm-combine-weights", "-1", "0"],
            "must be finite, with at least one above 0",
        ),
        ([*TWO, "--slm-combine", "sum", "--slm-combine-weights", "1", "nan"], "--slm-combine-weights"),
        ([*TWO, "--slm-combine", "sum", "--slm-combine-weights", "1", ".inf"], "must be finite"),
        ([*TWO, "--slm-combine", "union", "--slm-policy", "sample"], "must be top-k with --slm-combine union"),
        ([*TWO, "--slm-combine", "sum", "--slm-policy", "quantile"], "must be top-k or sample or weights with"),
        (["--slm-policy", "best"], "--slm-policy"),
        (["--slm-policy", "threshold"], "--slm-threshold is missing: required by --slm-policy threshold"),
        (["--slm-threshold", "1"], "--slm-threshold is 1.0: must be used with --slm-policy threshold"),
        (["--slm-policy", "threshold", "--slm-threshold", ".nan"], "--slm-threshold"),
        (["--slm-threshold-decay", "1"], r"--slm-threshold-decay is 1.0: must be in \[0, 1\)"),
        (["--slm-temperature", "0"], "--slm-temperature is 0.0: must be positive"),
        (["--slm-temperature", "-1"], "--slm-temperature is -1.0: must be positive"),
        (["--slm-policy", "weights", "--slm-weight-floor", "1.5"], "--slm-weight-floor is 1.5"),
        (["--slm-weight-floor", "0.1"], "must be used with --slm-weight gibbs or talr"),
        (["--slm-weight", "dtf"], "--slm-weight is 'dtf': must be one of dft, .*did you mean dft"),
        (["--slm-weight", "dft", "--objective", "clm"], "--slm-weight is 'dft': must not be used with --objective clm"),
        (["--slm-token-weights", "t", "--objective", "clm"], "must not be used with --objective clm"),
        (["--slm-weight", "dft", "--slm-weight-power", "2"], "must be used with --slm-weight eaft, focal or mile"),
        (["--slm-weight", "focal", "--slm-weight-power", "0"], "--slm-weight-power is 0.0: must be positive"),
        (["--slm-weight-power", "2"], "must be used with --slm-weight eaft, focal or mile"),
        (["--slm-weight-normalization", "mean"], "must be used with --slm-weight or --slm-token-weights"),
        (["--slm-policy", "weights", "--slm-weight-normalization", "none"], "must be mean with --slm-weight gibbs"),
        (["--slm-policy", "weights", "--slm-weight", "dft", "--slm-score", "loss"], "which read no score"),
        (["--slm-score", "external:a/b"], "--slm-score is 'external:a/b': must name a column"),
        (["--slm-score", "external:loss_mask"], "other than loss_mask"),
        (["--slm-protected-spans", "../x"], "--slm-protected-spans is '../x': must name a column"),
        (["--slm-protected-spans", "x", "--objective", "clm"], "must not be used with --objective clm"),
        (["--slm-protected-spans", "x", "--slm-policy", "weights"], "--slm-policy weights, which trains on all tokens"),
        (["--slm-keep-adaptation", "-1"], "--slm-keep-adaptation is -1.0: must be at least 0"),
        (["--slm-keep-adaptation", "1", "--slm-policy", "positive"], "be used with --slm-policy top-k or sample"),
        (["--slm-keep-adaptation", "1", "--slm-keep-ratio", "1"], "--slm-keep-ratio is 1.0: must be below 1"),
        (["--slm-keep-adaptation", "1", "--slm-keep-least", "0.7"], "must be at most --slm-keep-ratio, 0.6"),
        (["--slm-keep-least", "0.2"], "must be used with --slm-keep-adaptation"),
        (
            ["--slm-keep-adaptation", "1", "--slm-keep-schedule", "linear", "--slm-keep-decay-iters", "3"],
            "both change the ratio",
        ),
        (["--slm-keep-most", "0.8"], "must be used with --slm-policy positive"),
        (["--slm-policy", "positive", "--slm-keep-most", "0.5"], "must be at least --slm-keep-ratio, 0.6"),
        (["--slm-policy", "positive", "--slm-keep-most", "1.5"], "must be in"),
        (["--slm-policy", "positive", "--slm-score", "entropy"], "be a difference with --slm-policy positive"),
        (["--slm-policy", "positive", "--slm-score", "reference-loss"], "be a difference with --slm-policy positive"),
        (["--slm-policy", "peaking", "--slm-peaking-share", "0.3"], "must be at least 1 - --slm-keep-ratio, 0.4"),
        (["--slm-policy", "peaking", "--slm-peaking-length", "0"], "--slm-peaking-length is 0: must be positive"),
        (["--slm-peaking-length", "4"], "must be used with --slm-policy peaking"),
        (["--slm-peaking-share", "0.7"], "must be used with --slm-policy peaking"),
        (["--slm-scope", "world"], "--slm-scope"),
        (["--slm-scope", "sequence", "--slm-policy", "quantile"], "must be micro-batch with --slm-policy quantile"),
        (["--slm-keep-ratio", "0"], "--slm-keep-ratio"),
        (["--slm-keep-ratio", ".nan"], "--slm-keep-ratio"),
        (
            ["--slm-keep-schedule", "linear"],
            "--slm-keep-decay-iters is missing: required by --slm-keep-schedule linear",
        ),
        (["--slm-keep-decay-iters", "5"], "--slm-keep-decay-iters is 5: must be used with --slm-keep-schedule"),
        (["--slm-keep-schedule", "linear", "--slm-keep-decay-iters", "0"], "must be positive"),
        (["--slm-keep-schedule", "step"], "--slm-keep-schedule"),
        (["--slm-keep-warmup-iters", "-1"], "must be at least 0"),
        (["--slm-keep-start", "0"], "--slm-keep-start"),
        (["--slm-keep-schedule", "cosine", "--slm-keep-decay-iters", "5", "--slm-policy", "weights"], "fixed share"),
        (["--slm-always-keep", "-3"], "must contain token ids of at least 0"),
        (["--slm-never-keep", "x"], "--slm-never-keep"),
        (["--slm-always-keep", "3", "4", "--slm-never-keep", "4"], r"\(both contain 4\)"),
        (["--slm-always-keep", "3", "--slm-policy", "weights"], "must not be used with --slm-policy weights"),
        (["--slm-probe-interval", "-1"], "--slm-probe-interval"),
        (["--objective", "clm", "--reference-load", "x"], "must not be used with --objective clm"),
    ],
)
def test_refused(argv: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse([*BASE, *argv])


@pytest.mark.parametrize(
    "argv",
    [
        ["--slm-score", "clipped-excess"],
        ["--slm-score", "external:quality"],
        ["--slm-score", "reference-loss", "--reference-load", "a", "--reference-base", "b"],
        ["--slm-score", "reference-loss", "--reference-scores", "a", "b", "--reference-scores-combine", "difference"],
    ],
)
def test_differences_have_a_positive_part(argv: list[str]) -> None:
    assert parse([*BASE, "--slm-policy", "positive", *argv])[0].selection.slm_policy == "positive"


def build(**options: Any) -> Any:
    return build_selector(SelectionConfig(**options), seed=1, vocabulary_size=50)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "--reference-load is missing: required by --objective slm with --slm-score excess"),
        ({"slm_score": ["loss", "reference-entropy"], "slm_combine": "sum"}, "--slm-score reference-entropy"),
        ({"slm_score": ["loss"], "slm_always_keep": [3, 50]}, "--slm-always-keep is 50: must be an id .*below 50"),
        ({"slm_score": ["loss"], "slm_never_keep": [50]}, "--slm-never-keep is 50"),
    ],
)
def test_refused_by_the_selector(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(**options)


def test_a_reference_is_needed_by_the_scores_that_read_one() -> None:
    for name in ("loss", "-loss", "entropy", "random"):
        assert not build(slm_score=[name]).needs_reference
    assert build(slm_score=["loss"], reference_load="given anyway").scores
    assert build(objective="clm").scores == ()


def test_each_share_of_a_combination_defaults_to_the_keep_ratio() -> None:
    chosen = build(slm_score=["loss", "entropy"], slm_combine="union", slm_keep_ratio=0.7)
    assert chosen.combine_ratios == (0.7, 0.7)
    own = build(slm_score=["loss", "entropy"], slm_combine="union", slm_combine_ratios=[0.7, 0.9])
    assert own.combine_ratios == (0.7, 0.9)
    assert build(slm_score=["loss", "entropy"], slm_combine="sum").combine_weights == (1.0, 1.0)
