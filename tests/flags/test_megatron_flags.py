"""Flags of Megatron-LM that do not exist here: one error for all of them, each with the way over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_slm.config.rules import flag
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import ALIASES, known_flags, parse
from megatron_slm.flags.megatron_flags import MEGATRON_FLAGS, MEGATRON_PREFIXES, way_over


def test_no_flag_of_ours_is_in_the_table_and_those_it_names_exist() -> None:
    known = set(known_flags())
    assert not {f"--{name}" for name in MEGATRON_FLAGS} & known
    tables = [*MEGATRON_FLAGS.values(), *MEGATRON_PREFIXES.values()]
    named = {word for one in tables for word in re.findall(r"--[a-z][a-z0-9-]+", one.text)}
    assert named - known <= {"--perplexity", "--output"}  # of slm-evaluate and slm-convert


def test_every_training_argument_of_megatron_is_a_flag_or_has_a_way_over() -> None:
    lines = (Path(__file__).parent / "megatron_arguments.txt").read_text().splitlines()
    names = [name for line in lines if not line.startswith("#") for name in line.split()]
    assert len(names) > 550
    known = {*known_flags(), *map(flag, ALIASES)}
    assert [name for name in names if f"--{name}" not in known and way_over(name) is None] == []


def test_no_family_of_flags_hides_one_of_ours() -> None:
    assert [name for name in known_flags() if name.removeprefix("--").startswith(tuple(MEGATRON_PREFIXES))] == []


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("--use-flash-attn", "is here --attention-backend flash"),
        ("--swiglu", r"remove it: .* not needed \(always on\)"),
        ("--use-distributed-optimizer", "not needed"),
        ("--no_load_optim", "--init-from CHECKPOINT"),
        ("--transformer-impl", "not needed"),
        ("--distributed-backend", "NCCL on GPUs"),
        ("--num-layers-per-virtual-pipeline-stage", "not supported"),
        ("--cp-comm-type", "not supported"),
        ("--fp16", r"not supported \(fp16 training \(use --bf16"),
        ("--wandb-project", "DeepSpeed JSON"),
    ],
)
def test_each_has_a_way_over(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(["--train-iters", "1", name, "x"])


def test_all_unknown_flags_are_in_one_error() -> None:
    argv = ["--train-iters", "1", "--swiglu", "--transformer-impl", "local", "--trian-iters=3", "--fp16"]
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    text = str(caught.value)
    assert text.startswith("flags is '--swiglu, --transformer-impl, --trian-iters, --fp16': must be known flags.")
    assert "--trian-iters: did you mean --train-iters?" in text


def test_a_yaml_file_of_megatron_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("micro_batch_size: 2\ntrain_iters: 1\nobjective: clm\n")
    assert parse(["--config", str(path)])[0].training.micro_batch_size == 2
    path.write_text("micro_batch_size: 2\nswiglu: true\nuse_flash_attn: true\n")
    with pytest.raises(ConfigError, match=r"keys is 'swiglu, use_flash_attn'.*attention-backend flash"):
        parse(["--config", str(path)])


def test_names_of_nobody_have_no_way_over() -> None:
    assert way_over("--xyzzy") is None
