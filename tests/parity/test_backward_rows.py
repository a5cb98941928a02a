"""Sampled backward passes: the same rows and losses at every layout, schedule and after a resume; bad steps are seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.engine import rows as engine_rows
from megatron_slm.model import row_sampling
from megatron_slm.model.sampled_block import _Pass
from megatron_slm.parallel.context import positions
from megatron_slm.parallel.groups import ContextParallel
from tests.parity.test_layouts import layout_flags, world_size
from tests.parity.test_resume import assert_bit_equal, metrics
from tests.support.rows import train_and_report_rows
from tests.support.runs import SEQ_LENGTH, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.world import run_world

SHARE = {"backward_rows": "sampled", "backward_row_share": 0.6}
CONTROLLED = {"backward_rows": "sampled", "backward_row_variance": 0.02}
KEPT = {"backward_rows": "kept"}


@dataclass
class Outcome:
    lines: list[dict[str, Any]]
    drawn: dict[tuple[int, ...], tuple[list[int], list[float]]]
    reports: list[dict[str, Any]]

    def column(self, name: str) -> list[Any]:
        return [line[name] for line in self.lines if "event" not in line]


def merged(reports: list[dict[str, Any]]) -> dict[tuple[int, ...], tuple[list[int], list[float]]]:
    """Rows by (seed, step, micro-batch, block, part); ranks that hold the same rows must have drawn the same."""
    found: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}
    for report in reports:
        for key, drawn in report["drawn"].items():
            assert found.setdefault(key, drawn) == drawn, f"ranks drew different rows: {key}"
    return found


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    folder = tmp_path_factory.mktemp("rows")
    corpus, reference = write_corpus(folder / "corpus"), save_hf_llama(folder / "reference")
    done: dict[str, Outcome] = {}

    def run(layout: str, *, target: Any = train_and_report_rows, args: tuple[Any, ...] = (), **changes: Any) -> Outcome:
        key = json.dumps([layout, target.__name__, args, changes], default=str)
        if key not in done:
            run_dir: Path = folder / str(len(done))
            values = {"objective": "slm", "reference_load": reference, **SHARE, **layout_flags(layout), **changes}
            size = world_size(layout) * changes.get("context_parallel_size", 1)
            reports = run_world(target, size, run_flags(corpus, run_dir, **values), *args)
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            done[key] = Outcome(lines, merged(reports), reports)
        return done[key]

    return run


def assert_same(outcome: Outcome, single: Outcome) -> None:
    for name in ("loss", "loss_all", "kept_tokens", "grad_norm"):
        assert outcome.column(name) == pytest.approx(single.column(name), rel=1e-5), name
    for name in ("backward_row_share", "backward_added_variance", "backward_added_variance_max"):
        assert outcome.column(name) == pytest.approx(single.column(name), rel=1e-4), name
    assert outcome.drawn.keys() == single.drawn.keys()
    assert len(single.drawn) == 5 * 4 * 4  # steps, micro-batches, blocks
    for key, (rows, weights) in single.drawn.items():
        assert outcome.drawn[key][0] == rows, key
        assert outcome.drawn[key][1] == pytest.approx(weights, rel=1e-3), key


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("layout", ["221", *map(slow, ("211", "121", "112", "122", "222"))])
def test_layout(train: Train, layout: str) -> None:
    assert_same(train(layout), train("111"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["211", "222"])
def test_layout_with_controlled_shares(train: Train, layout: str) -> None:
    single = train("111", **CONTROLLED, backward_row_share=None)
    shares = single.column("backward_row_share")
    assert shares[0] == (3 + 20 / 32) / 4, "the last block has no gradient but on the kept tokens"
    assert sorted(shares, reverse=True) == shares != [shares[0]] * 5
    assert_same(train(layout, **CONTROLLED, backward_row_share=None), single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["211", "121", "222"])
def test_layout_with_kept_rows(train: Train, layout: str) -> None:
    changes = {**KEPT, "backward_row_share": None}
    single = train("111", **changes)
    assert single.column("backward_added_variance") == [None] * 5
    assert single.column("backward_row_share") == [20 / 32] * 5
    outcome = train(layout, **changes)
    assert outcome.column("loss") == pytest.approx(single.column("loss"), rel=1e-5)
    assert outcome.drawn == single.drawn


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("layout", "stage"), [("112", 2), ("122", 2), ("112", 3), ("122", 3)])
def test_zero_2_and_3(train: Train, layout: str, stage: int, tied: bool, tmp_path: Path) -> None:
    config = Path(zero_config(stage))
    if stage == 3:  # small parameters otherwise stay gathered, and these models have no large ones
        config = tmp_path / "zero3.json"
        config.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    # a seed at which no two tokens' scores are as near each other as rounding
    changes = {"no_untie_embeddings_and_output_weights": True, "seed": 7} if tied else {}
    assert_same(train(layout, deepspeed_config=config, **changes), train("111", **changes))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["111", "221"])
def test_recomputing_activations(train: Train, layout: str) -> None:
    """The same gradient up to rounding: rows are multiplied in other shapes."""
    assert_same(train(layout, recompute_granularity="full"), train("111"))


@pytest.mark.slow
def test_zero_3_recomputing(train: Train) -> None:
    assert_same(train("112", deepspeed_config=zero_config(3), recompute_granularity="full"), train("111"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes", "parts"),
    [
        ("121", {"sequence_parallel": True}, 2),
        ("222", {"sequence_parallel": True}, 2),
        ("111", {"context_parallel_size": 2}, 2),
        ("212", {"context_parallel_size": 2}, 2),
        ("121", {"context_parallel_size": 2, "sequence_parallel": True}, 4),
        ("111", {"context_parallel_size": 4, "deepspeed_config": zero_config(3)}, 4),
    ],
)
def test_ranks_draw_from_their_own_part_of_a_sequence(
    train: Train, layout: str, changes: dict[str, Any], parts: int
) -> None:
    outcome, single = train(layout, **changes), train("111")
    assert {key[-1] for key in outcome.drawn} == set(range(parts))
    assert {len(rows) for rows, _ in outcome.drawn.values()} == {{2: 10, 4: 5}[parts]}  # ceil(0.6 x 32 / parts)
    assert len(outcome.drawn) == parts * len(single.drawn)
    assert outcome.column("loss")[0] == pytest.approx(single.column("loss")[0], rel=1e-5)
    assert outcome.column("backward_added_variance") == pytest.approx(single.column("backward_added_variance"), rel=0.9)


@pytest.mark.parametrize(
    ("layout", "size"), [("111", 2), slow("111", 4), slow("121", 2), slow("212", 2)], ids=["c2", "c4", "tp2", "pp2-dp2"]
)
def test_kept_rows_of_cut_sequences_are_those_of_whole_ones(train: Train, layout: str, size: int) -> None:
    changes = {**KEPT, "backward_row_share": None}
    outcome, single = train(layout, context_parallel_size=size, **changes), train("111", **changes)
    for name in ("loss", "loss_all", "kept_tokens", "grad_norm"):
        assert outcome.column(name) == pytest.approx(single.column(name), rel=1e-5), name
    whole: dict[tuple[int, ...], set[int]] = {}
    for (*key, part), (rows, weights) in outcome.drawn.items():
        held = positions(SEQ_LENGTH, ContextParallel(size=size, rank=part))
        mine = [row for row, weight in zip(rows, weights, strict=True) if weight > 0]
        assert len(mine) >= len(rows) - 1, "as many as there are, and one where there is none"
        whole.setdefault(tuple(key), set()).update(int(held[row // 2]) * 2 + row % 2 for row in mine)
    for (*key, _), (rows, weights) in single.drawn.items():
        assert whole.pop(tuple(key)) == {row for row, weight in zip(rows, weights, strict=True) if weight > 0}
    assert not whole


@pytest.mark.slow
def test_shares_of_cut_sequences_are_controlled_alike_on_all_ranks(train: Train) -> None:
    outcome = train("211", context_parallel_size=2, **CONTROLLED, backward_row_share=None)
    shares = outcome.column("backward_row_share")
    assert shares[0] == (3 + 20 / 32) / 4, "the last block has no gradient but on the kept tokens"
    assert sorted(shares, reverse=True) == shares != [shares[0]] * 5
    counts = {}
    for (_, step, _, block, _), (rows, _) in outcome.drawn.items():
        counts.setdefault((step, block), set()).add(len(rows))
    assert all(len(found) == 1 for found in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["111", "222"])
def test_bf16(train: Train, layout: str) -> None:
    outcome = train(layout, bf16=True)
    assert outcome.column("loss") == pytest.approx(train("111").column("loss"), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "clm", "reference_load": None, "backward_row_share": 0.8},
        {"reset_attention_mask": True, "reset_position_ids": True},
        {"window_size": 5, "qk_layernorm": True, "add_qkv_bias": True, "num_query_groups": 4},
    ],
    ids=["clm", "documents", "window"],
)
def test_options(train: Train, changes: dict[str, Any]) -> None:
    assert_same(train("221", **changes), train("111", **changes))


@pytest.mark.slow
def test_share_1_is_the_exact_path(train: Train) -> None:
    exact = train("111", backward_rows=None, backward_row_share=None)
    whole = train("111", backward_row_share=1.0)
    assert whole.column("loss") == exact.column("loss")
    assert whole.column("grad_norm") == exact.column("grad_norm")
    assert whole.column("backward_row_share") == [None] * 5
    assert not whole.drawn
    assert exact.column("loss")[0] == train("111").column("loss")[0], "the forward pass is the same"
    assert exact.column("loss")[1] != train("111").column("loss")[1]


@pytest.mark.slow
def test_schedules_are_bit_equal(train: Train) -> None:
    plainest = train("211", reference_schedule="ride-along", **CONTROLLED, backward_row_share=None)
    for mode in ("skewed", "bubble", "sequential"):
        other = train("211", reference_schedule=mode, **CONTROLLED, backward_row_share=None)
        assert other.drawn == plainest.drawn
        for name in ("loss", "grad_norm", "backward_added_variance", "backward_row_share"):
            assert other.column(name) == plainest.column(name), name
        assert_bit_equal(plainest.reports, other.reports)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [("211", CONTROLLED), slow("222", {**CONTROLLED, "sequence_parallel": True}), slow("111", KEPT), slow("211", SHARE)],
    ids=["controlled", "sequence-parallel", "kept", "share"],
)  # fmt: skip
def test_resume_is_bit_exact(layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {"objective": "slm", "reference_load": reference, "train_iters": 6, "lr_decay_iters": 6, **changes}
    common |= layout_flags(layout)
    size = world_size(layout)
    straight = run_world(train_and_report_rows, size, run_flags(corpus, tmp_path / "straight", **common))
    stopped = run_flags(corpus, tmp_path / "resumed", **{**common, "train_iters": 3}, save_interval=3)
    run_world(train_and_report_rows, size, stopped)
    again = run_flags(corpus, tmp_path / "resumed", **common, load=tmp_path / "resumed" / "checkpoints")
    resumed = run_world(train_and_report_rows, size, again)
    assert_bit_equal(straight, resumed)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")
    late = {key: drawn for key, drawn in merged(straight).items() if key[1] >= 3}
    assert late == merged(resumed)
    manifest = json.loads((tmp_path / "resumed/checkpoints/step_00000003/manifest.json").read_text())
    shares = manifest.get("row_shares", [])
    assert len(shares) == (4 if "backward_row_variance" in changes else 0)
    assert all(13 <= share < 16 for share in shares), "a step at a time down from 16"


@pytest.mark.slow
def test_a_checkpoint_without_shares_starts_at_the_highest(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    first = run_flags(corpus, tmp_path / "first", train_iters=2, save_interval=2)
    run_world(train_and_report_rows, 1, first)
    more = {**CONTROLLED, "backward_row_share_range": [0.5, 0.75]}
    again = run_flags(corpus, tmp_path / "again", train_iters=4, load=tmp_path / "first/checkpoints", **more)
    run_world(train_and_report_rows, 1, again)
    assert metrics(tmp_path / "again")[0]["backward_row_share"] == 0.75


# ---- faults --------------------------------------------------------------------------------------------------


def train_with_a_fault(values: dict[str, Any], fault: str) -> dict[str, Any]:
    import os

    rank, real = int(os.environ["RANK"]), row_sampling.uniform_number
    if fault == "a rank that draws others" and rank == 1:
        row_sampling.uniform_number = lambda *key: real(*key, 1)
    elif fault == "the same draw in all blocks":
        row_sampling.uniform_number = lambda *key: real(*key[:-2])
    elif fault == "rows of another micro-batch":
        whole = engine_rows.RowSampler.of_micro_batch
        engine_rows.RowSampler.of_micro_batch = lambda self, number, settings: whole(self, (number + 1) % 2, settings)
    return train_and_report_rows(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("121", "a rank that draws others"),
        ("111", "the same draw in all blocks"),
        ("112", "rows of another micro-batch"),
    ],
)
def test_faults_are_found(train: Train, layout: str, fault: str) -> None:
    with pytest.raises(AssertionError):
        assert_same(train(layout, target=train_with_a_fault, args=(fault,)), train("111"))


def train_with_bad_unkept_gradient(values: dict[str, Any]) -> dict[str, Any]:
    """In the third step one row that carries a gradient only below the last block gets a NaN there."""
    real = _Pass.run

    def run(self: _Pass, dz_sbd: torch.Tensor, rows: Any) -> torch.Tensor:
        dx_sbd = real(self, dz_sbd, rows)
        unkept = (dz_sbd == 0).all(-1).nonzero()
        if rows.key[1:] == (2, 1) and self.block.index == 3:
            s, b = unkept[0].tolist()
            dx_sbd[s, b, 5] = math.nan
        return dx_sbd

    _Pass.run = run  # type: ignore[method-assign]
    return train_and_report_rows(values)


def test_a_bad_gradient_of_an_unkept_token_skips_the_step(train: Train) -> None:
    outcome = train("111", target=train_with_bad_unkept_gradient)
    assert outcome.column("skip_reason") == [None, None, "nonfinite-gradient", None, None]
    assert [line["step"] for line in outcome.lines if line.get("event") == "bad-batch"] == [3]
    assert outcome.column("loss")[2] == outcome.column("loss")[2] < 10
