"""References that cannot follow the model end a run before its first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.run.checks import check_reference_update
from megatron_slm.run.plan import Plan, make_plan
from tests.support.runs import MODEL_FLAGS, flags, run_flags, save_hf_llama, write_corpus, zero_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("following")
    write_corpus(path / "corpus")
    save_hf_llama(path / "model")
    save_hf_llama(path / "wider", hidden_size=32)
    return path


def plan(folder: Path, **changes: Any) -> Plan:
    architecture = dict.fromkeys((*(name.replace("-", "_") for name in MODEL_FLAGS), "init_method_std"))
    following = {"init_from": folder / "model", "reference_load": "init", "reference_update": "ema"}
    values = run_flags(folder / "corpus", folder / "run", objective="slm", **{**architecture, **following, **changes})
    return make_plan(parse(flags(values))[0], 1)


def test_a_reference_of_another_architecture(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must be of the model's architecture with --reference-update ema"):
        plan(folder, reference_load=folder / "wider")


def test_zero_3(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--reference-update is 'ema': must be none with ZeRO-3"):
        plan(folder, deepspeed_config=zero_config(3))
    assert plan(folder, deepspeed_config=zero_config(2)).config.reference_update.updates


def test_a_checkpoint_without_the_reference(folder: Path) -> None:
    made = plan(folder)
    for files, fits in ((["weights_00.safetensors"], False), (["weights_00.safetensors", "reference_00"], True)):
        resume: Any = SimpleNamespace(manifest=SimpleNamespace(files=files), folder=folder / "checkpoint")
        if fits:
            check_reference_update(made.config, made.models, resume)
        else:
            with pytest.raises(CheckpointError, match=r"--load is .*must contain the reference of a run with"):
                check_reference_update(made.config, made.models, resume)
