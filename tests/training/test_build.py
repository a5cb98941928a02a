"""Trained modules are made in the dtype they are trained in: never as a copy in fp32 beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_slm.flags.load import parse
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.run.plan import make_plan
from megatron_slm.training import build
from tests.support.runs import flags, run_flags, write_corpus, zero_config
from tests.support.world import run_world


def made_dtypes(values: dict[str, Any]) -> set[torch.dtype]:
    """Dtypes of the module's parameters before an engine has seen it."""
    init_distributed()
    found: set[torch.dtype] = set()
    real = build.build_optimizer

    def optimizer(module: nn.Module, *arguments: Any) -> Any:
        found.update(p.dtype for p in module.parameters())
        return real(module, *arguments)

    build.build_optimizer = optimizer
    build.build_run(make_plan(parse(flags(values))[0], dist.get_world_size(), rank=dist.get_rank()))
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_modules_are_made_in_their_final_dtype(stage: int, tmp_path: Path) -> None:
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", bf16=True, deepspeed_config=zero_config(stage)
    )
    assert run_world(made_dtypes, 1, values) == [{torch.bfloat16}]
