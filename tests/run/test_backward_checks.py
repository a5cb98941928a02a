"""Combinations of --backward-rows that are refused before the first step, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.run.backward_checks import check_backward_rows
from megatron_slm.selection.configure import build_selector
from tests.support.runs import flags, run_flags

ARCHITECTURE = Architecture(
    num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2, kv_channels=4, vocab_size=97
)  # fmt: skip
KEPT = {"backward_rows": "kept", "objective": "slm", "slm_score": "loss"}


def check(norms: str = "before", **changes: Any) -> None:
    config, _ = parse(flags(run_flags(Path("corpus"), Path("run"), **changes)))
    selector = build_selector(config.selection, seed=1, vocabulary_size=97)
    check_backward_rows(config, selector, replace(ARCHITECTURE, norm_placement=norms))


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({**KEPT, "norms": "around"}, "--backward-rows", "whose norms are around attention and MLP"),
        ({"recompute_granularity": "selective", "norms": "after"}, "--recompute-granularity", "whose norms are after"),
        ({**KEPT, "compile_blocks": True}, "--compile-blocks", "--backward-rows exact"),
        ({"backward_rows": "sampled", "backward_row_share": 0.5, "compile_blocks": True}, "--compile-blocks", "leave it out"),
        ({"backward_rows": "sampled", "backward_row_share": 0.5}, "--backward-row-share", "add 0.78"),
        (
            {"backward_rows": "sampled", "backward_row_share": 0.3, "objective": "slm", "slm_score": "loss"},
            "--backward-row-share",
            "0.6 of the tokens kept",
        ),
        ({**KEPT, "sequence_parallel": True, "tensor_model_parallel_size": 2}, "--sequence-parallel", "sampled"),
        ({"backward_rows": "kept"}, "--backward-rows", "--objective clm"),
        ({**KEPT, "slm_scope": "data-parallel"}, "--backward-rows", "data-parallel"),
        ({**KEPT, "slm_policy": "threshold", "slm_threshold": 1.0}, "--backward-rows", "threshold"),
        ({**KEPT, "slm_policy": "weights"}, "--backward-rows", "weights"),
        ({**KEPT, "slm_policy": "quantile"}, "--backward-rows", "quantile"),
        ({**KEPT, "slm_always_keep": 3}, "--backward-rows", "1 ids in --slm-always-keep"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check(**changes)
    assert error.value.field == field


@pytest.mark.parametrize(
    "changes",
    [
        {},
        KEPT,
        {**KEPT, "slm_scope": "sequence", "slm_policy": "sample"},
        {"backward_rows": "sampled", "backward_row_share": 0.6},
        {"backward_rows": "sampled", "backward_row_share": 0.4, "objective": "slm", "slm_score": "loss", "slm_keep_ratio": 0.3},
        {"backward_rows": "sampled", "backward_row_share": 1.0, "compile_blocks": True},
        {"backward_rows": "sampled", "backward_row_variance": 0.02, "sequence_parallel": True, "tensor_model_parallel_size": 2},
    ],
)  # fmt: skip
def test_accepted(changes: dict[str, Any]) -> None:
    check(**changes)


def test_kept_rows_have_room_for_every_kept_token() -> None:
    from megatron_slm.selection.schedule import KeepSchedule
    from megatron_slm.selection.scores import score_named
    from megatron_slm.selection.selector import Selector

    one, two = (score_named(name) for name in ("loss", "entropy"))
    assert Selector(scores=(one,), keep_ratio=0.6).most_kept(0, 2, 16) == 20
    assert Selector(scores=(one,), keep_ratio=0.6, scope="sequence").most_kept(0, 2, 16) == 20
    assert Selector(scores=(one,), keep_ratio=0.6, scope="sequence").most_kept(0, 3, 9) == 18
    both = {"scores": (one, two), "combine_ratios": (0.5, 0.25)}
    assert Selector(**both, combine="union").most_kept(0, 2, 16) == 24
    assert Selector(**both, combine="intersection").most_kept(0, 2, 16) == 8
    warming = Selector(scores=(one,), keep_ratio=0.6, schedule=KeepSchedule(warmup_iters=3))
    assert [warming.most_kept(step, 2, 16) for step in (0, 2, 3)] == [32, 32, 20]
    assert Selector().most_kept(0, 2, 16) == 32
