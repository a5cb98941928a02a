from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_slm.config.load import parse, to_flat_dict, write_yaml
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
        (["--xyzzy"], "see --help for the known names"),
        ([], r"--train-iters = None"),
        (["--objective", "clm"], r"--train-iters = None"),
        ([*BASE, "--lr", "fast"], r"--lr = 'fast'"),
        ([*BASE, "--lr", "-1"], "greater than 0"),
        ([*BASE, "--objective", "rlhf"], "--objective"),
        ([*BASE, "--min-lr", "1"], r"is at most --lr"),
        ([*BASE, "--lr-decay-style", "WSD"], "lr-wsd-decay-iters"),
        ([*BASE, "--adam-beta2", "1.0"], r"lies in \[0, 1\)"),
        ([*BASE, "--weight-decay", "-0.1"], "is 0 or more"),
        ([*BASE, "--seed", "-1"], "is 0 or more"),
        (
            [*BASE, "--data-path", "1", "a", "0", "b"],
            r"--data-path = 0.0: is a finite number above 0 \(the weight of b\)",
        ),
        ([*BASE, "--config", "/nonexistent.yaml"], "is a readable file"),
        ([*BASE, "--config", "a.yaml", "--config=b.yaml"], r"--config = \['a.yaml', 'b.yaml'\]: is given once"),
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
        ("lr: fast", r"lr in .*run.yaml = 'fast'"),
        ("- a\n- b", "is a mapping"),
        ("a: [", "is a YAML file"),
        ("sequence-parallel: 7", "sequence_parallel in"),
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
