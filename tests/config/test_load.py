from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_slm.config.load import parse, to_flat_dict, write_yaml
from megatron_slm.config.scores import SCORE_DEFINITIONS
from megatron_slm.errors import ConfigError

BASE = ["--train-iters", "3", "--objective", "clm"]


def test_command_line_over_yaml_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nmicro_batch_size: 4\ndata-path: a\nvalid-data-path: [x=b, c]\n")
    for argv in (["--config", str(path), "--lr", "2e-4", *BASE], [*BASE, "--lr=2e-4", f"--config={path}"]):
        config, dry_run = parse(argv)
        assert config.optimizer.lr == 2e-4
        assert config.training.micro_batch_size == 4
        assert config.data.data_path == ["a"]
        assert config.data.valid_data_path == ["x=b", "c"]
        assert not dry_run


def test_scientific_notation_in_yaml_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\n")
    assert parse(["--config", str(path), *BASE])[0].optimizer.lr == 1e-4


def test_flags_of_truth_and_aliases() -> None:
    config, dry_run = parse([*BASE, "--bf16", "--no_eod_mask_loss", "--num-key-value-heads", "2", "--dry-run"])
    assert config.training.bf16
    assert not config.data.eod_mask_loss
    assert config.model.num_query_groups == 2
    assert dry_run


def test_the_written_configuration_repeats_the_run(tmp_path: Path) -> None:
    config, _ = parse(
        [*BASE, "--lr", "3e-5", "--data-path", "x", "--rope-scaling", '{"rope_type": "linear", "factor": 2.0}']
    )
    write_yaml(config, tmp_path / "sub" / "config.yaml")
    again, _ = parse(["--config", str(tmp_path / "sub" / "config.yaml")])
    assert again == config
    assert set(yaml.safe_load((tmp_path / "sub" / "config.yaml").read_text())) == set(to_flat_dict(config))


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--trian-iters", "3"], r"did you mean --train-iters\?"),
        (["--xyzzy"], "see --help for all flags"),
        ([], r"--train-iters is missing: required by every run"),
        (["--objective", "clm"], r"--train-iters is missing: required by every run"),
        ([*BASE, "--lr", "fast"], r"--lr is 'fast': must be a number"),
        ([*BASE, "--lr", "-1"], "--lr is -1.0: must be at least 0"),
        ([*BASE[:2], "--objective", "rlhf"], "--objective is 'rlhf': must be one of slm, clm"),
        ([*BASE, "--micro-batch-size", "1.5"], "--micro-batch-size is .*must be a whole number"),
        ([*BASE, "--profile-ranks", "0", "a"], "--profile-ranks is .*must be a whole number"),
        ([*BASE, "--recompute-granularity", "half"], "must be one of full"),
        ([*BASE, "--without-files"], "--dry-run is missing: required by --without-files"),
        ([*BASE, "--keep-best", "web"], "--keep-last is missing: required by --keep-best"),
        ([*BASE, "--load-fallback"], "--load is missing: required by --load-fallback"),
        ([*BASE, "--skip-loss-spikes"], "--loss-spike-sigmas is missing: required by --skip-loss-spikes"),
        ([*BASE, "--min-lr", "1"], r"must not exceed --lr"),
        ([*BASE, "--lr-decay-style", "WSD"], "lr-wsd-decay-iters"),
        ([*BASE, "--adam-beta2", "1.0"], r"must be in \[0, 1\)"),
        ([*BASE, "--weight-decay", "-0.1"], "must be at least 0"),
        ([*BASE, "--seed", "-1"], "must be at least 0"),
        (
            [*BASE, "--data-path", "1", "a", "0", "b"],
            r"--data-path is 0.0: must be a finite number above 0 \(weight of b\)",
        ),
        ([*BASE, "--config", "/nonexistent.yaml"], "must be a readable file"),
        ([*BASE, "--config", "a.yaml", "--config=b.yaml"], "flag is '--config': must be used once. Fix: keep one"),
        ([*BASE, "--lr", "1", "--lr=2", "--bf16", "--no_bf16"], "flags is '--lr, --bf16': must be used once"),
        ([*BASE, "--rope-theta", "1", "--rotary_base", "2"], "flag is '--rotary-base': must be used once"),
        (
            [*BASE, "--data-path", "a", "--data-path", "b"],
            "flag is '--data-path': .* a list's values follow each other",
        ),
        ([*BASE, "stray"], "command line"),
    ],
)
def test_refused(argv: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(argv)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("train_itres: 3", r"did you mean --train-iters\?"),
        ("lr: fast", r"run.yaml: lr is 'fast': must be a number"),
        ("- a\n- b", "must map flag names to values"),
        ("a: [", "must be a YAML file"),
        ("sequence-parallel: 7", "run.yaml: sequence-parallel is .*must be true or false"),
    ],
)
def test_refused_in_yaml(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        parse([*BASE, "--config", str(tmp_path / "run.yaml")])


def test_an_empty_yaml_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert parse([*BASE, "--config", str(tmp_path / "run.yaml")])[0] == parse(BASE)[0]


def test_help_is_grouped_and_says_what_every_flag_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for group in ("model:", "parallel:", "data:", "selection:", "optimizer:", "training:", "checkpoint:", "logging:"):
        assert f"\n{group}\n" in text
    config, _ = parse(BASE)
    for flag in to_flat_dict(config):
        assert f"--{flag}" in text
    for score in SCORE_DEFINITIONS.values():
        assert f"{score.formula}  [{score.source}]" in " ".join(text.split()).replace(" [", "  [")


def test_the_help_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, megatron_slm.config.load; print({'torch', 'deepspeed', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"
