"""Flags of recomputation: what is refused by name, and what the blocks of a stage do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.parallel import ParallelConfig
from megatron_slm.config.recomputation import KEEP_ALL, Recomputation
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse
from tests.support.runs import flags, run_flags

SAMPLED = {"backward_rows": "sampled", "backward_row_share": 0.7}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"recompute_num_layers": 2}, "--recompute-num-layers"),
        ({"recompute_granularity": "selective", "recompute_num_layers": 2}, "--recompute-num-layers"),
        ({"recompute_granularity": "selective", "recompute_method": "uniform"}, "--recompute-method"),
        ({"recompute_granularity": "full", "recompute_method": "block"}, "--recompute-num-layers"),
        ({"recompute_granularity": "full", "recompute_num_layers": 0}, "--recompute-num-layers"),
    ],
)
def test_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelConfig(**values)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"recompute_granularity": "selective", "compile_blocks": True}, "--compile-blocks"),
        ({"recompute_granularity": "full", "recompute_num_layers": 2, **SAMPLED}, "--recompute-num-layers"),
        ({"offload_activations": True, **SAMPLED}, "--offload-activations"),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 1,
                "offload_activations": True,
                **SAMPLED,
            },
            "--offload-activations",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(values: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        parse(flags(run_flags(tmp_path / "corpus", tmp_path / "run", **values)))
    assert error.value.field == field


def test_the_rule_of_the_flags() -> None:
    assert ParallelConfig().recomputation == KEEP_ALL
    full = ParallelConfig(recompute_granularity="full")
    assert full.recomputation == Recomputation(granularity="full", method="uniform", num_layers=1)
    some = ParallelConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    assert some.recomputation.units(5) == [1, 1, 1]


def test_units_of_blocks() -> None:
    assert KEEP_ALL.units(5) == Recomputation(granularity="selective").units(5) == []
    assert Recomputation(granularity="full").units(3) == [1, 1, 1]
    assert Recomputation(granularity="full", num_layers=2).units(5) == [2, 2, 1]
    assert Recomputation(granularity="full", num_layers=9).units(5) == [5]
    block = Recomputation(granularity="full", method="block", num_layers=2)
    assert block.units(5) == [1, 1]
    assert block.units(1) == [1]
    assert block.kinds(5) == [(2, "full"), (3, None)]
    assert block.kinds(2) == [(2, "full")]
    assert Recomputation(granularity="selective").kinds(4) == [(4, "selective")]
