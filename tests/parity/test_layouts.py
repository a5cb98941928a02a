"""Every layout trains as one process does: losses, gradient norms and the very tokens that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import some_by_default
from tests.support.runs import run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import run_world

LAYOUTS = ["211", "121", "112", "221", "212", "122", "222"]  # pipeline, tensor, data
SEQUENCE_PARALLEL = ["121", "221", "122", "222"]


@dataclass
class Outcome:
    lines: list[dict[str, Any]]
    kept: dict[bytes, list[int]]
    reports: list[dict[str, Any]]

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if "event" not in line]


def layout_flags(layout: str) -> dict[str, Any]:
    pipeline, tensor, _ = (int(x) for x in layout)
    return {"pipeline_model_parallel_size": pipeline, "tensor_model_parallel_size": tensor}


def world_size(layout: str) -> int:
    return int(layout[0]) * int(layout[1]) * int(layout[2])


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    folder = tmp_path_factory.mktemp("layouts")
    corpus = write_corpus(folder / "corpus")
    held_out = write_corpus(folder / "held_out", seed=5, num_documents=7)
    reference = save_hf_llama(folder / "reference")
    done: dict[str, Outcome] = {}

    def run(layout: str, **changes: Any) -> Outcome:
        key = json.dumps([layout, changes], default=str)
        if key not in done:
            run_dir: Path = folder / str(len(done))
            values = {"objective": "slm", "reference_load": reference, "valid_data_path": [f"held={held_out}"]}
            values |= {**layout_flags(layout), **changes}
            reports = run_world(train_and_report, world_size(layout), run_flags(corpus, run_dir, **values))
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            done[key] = Outcome(lines, merge_kept(reports), reports)
        return done[key]

    return run


def merge_kept(reports: list[dict[str, Any]]) -> dict[bytes, list[int]]:
    """Kept rows by the micro-batch's tokens; ranks that saw the same micro-batch must agree."""
    merged: dict[bytes, list[int]] = {}
    for report in reports:
        seen: set[bytes] = set()
        for tokens, kept in report["kept"]:
            if tokens not in seen:  # the same samples come again in later epochs, with other kept tokens
                seen.add(tokens)
                assert merged.setdefault(tokens, kept) == kept, "ranks kept different tokens"
    return merged


def assert_same(outcome: Outcome, single: Outcome, *, rtol: float = 1e-5) -> None:
    for name in ("loss", "loss_all", "loss_unselected", "reference_loss", "excess_selected", "kept_tokens"):
        assert outcome.column(name) == pytest.approx(single.column(name), rel=rtol, abs=1e-6), name
    assert outcome.column("grad_norm") == pytest.approx(single.column("grad_norm"), rel=1e-5)
    assert outcome.kept == single.kept
    evaluated = [[line["loss"] for line in o.lines if line.get("event") == "eval"] for o in (outcome, single)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=rtol)
    assert len(evaluated[0]) == 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(train: Train, layout: str, tied: bool) -> None:
    changes = {"no_untie_embeddings_and_output_weights": True} if tied else {}
    assert_same(train(layout, **changes), train("111", **changes))


@pytest.mark.parametrize("tied", some_by_default([False, True], True), ids=["untied", "tied"])
@pytest.mark.parametrize("layout", SEQUENCE_PARALLEL)
def test_sequence_parallel(train: Train, layout: str, tied: bool) -> None:
    changes = {"no_untie_embeddings_and_output_weights": True} if tied else {}
    assert_same(train(layout, sequence_parallel=True, **changes), train("111", **changes))


@pytest.mark.parametrize(("layout", "stage"), [("112", 2), ("122", 2), ("112", 3), ("122", 3)])
def test_zero_2_and_3(train: Train, layout: str, stage: int) -> None:
    assert_same(train(layout, deepspeed_config=zero_config(stage)), train("111"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_zero_3_with_every_parameter_partitioned(train: Train, tied: bool, tmp_path: Path) -> None:
    """Small parameters otherwise stay gathered, and these models have no large ones."""
    config = tmp_path / "zero3.json"
    config.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    changes = {"no_untie_embeddings_and_output_weights": True} if tied else {}
    assert_same(train("112", deepspeed_config=config, **changes), train("111", **changes))


def test_zero_3_with_second_shares_inside_the_nodes(train: Train, tmp_path: Path) -> None:
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}
    config.write_text(json.dumps({"zero_optimization": zero}))
    assert_same(train("112", deepspeed_config=config), train("111"))


def test_zero_3_with_everything(train: Train) -> None:
    changes = {"no_untie_embeddings_and_output_weights": True}
    outcome = train(
        "122",
        deepspeed_config="ds_configs/zero3_bf16.json",
        sequence_parallel=True,
        recompute_granularity="full",
        **changes,
    )
    assert_same(outcome, train("111", **changes))


@pytest.mark.parametrize("layout", ["111", "221"])
def test_recomputing_activations_changes_nothing(train: Train, layout: str) -> None:
    recomputed, stored = train(layout, recompute_granularity="full"), train(layout)
    for one, other in zip(recomputed.reports, stored.reports, strict=True):
        training_calls = 4 * 5 * 2  # micro-batches a step, steps, blocks a stage of two
        assert one["block_calls"] - other["block_calls"] == training_calls * (2 if layout == "111" else 1)
    assert recomputed.column("loss") == stored.column("loss")
    assert recomputed.column("grad_norm") == stored.column("grad_norm")


SELECTIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "pipeline and sequence parallel": ("221", {"sequence_parallel": True}),
    "tensor parallel": ("121", {}),
    "zero 1": ("112", {}),
    "zero 2": ("112", {"deepspeed_config": zero_config(2)}),
    "zero 3": ("122", {"deepspeed_config": zero_config(3), "sequence_parallel": True}),
}


@pytest.mark.parametrize("name", some_by_default(SELECTIVE, "pipeline and sequence parallel"))
def test_selective_recomputation_changes_nothing(train: Train, name: str) -> None:
    layout, changes = SELECTIVE[name]
    recomputed, stored = train(layout, **changes, recompute_granularity="selective"), train(layout, **changes)
    for column in ("loss", "grad_norm"):
        expected: Any = stored.column(column)
        if name == "zero 3":  # it gathers a block's weights together, and products round by their place in memory
            expected = pytest.approx(expected, rel=1e-6)
        assert recomputed.column(column) == expected
    for one, other in zip(recomputed.reports, stored.reports, strict=True):
        assert one["block_calls"] == other["block_calls"]


OFFLOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "zero 3": ("112", {"deepspeed_config": zero_config(3)}),
    "recomputed by halves": ("221", {"sequence_parallel": True, "recompute_granularity": "selective"}),
    "recomputed": ("211", {"recompute_granularity": "full"}),
}


@pytest.mark.parametrize("name", some_by_default(OFFLOADED, "zero 3"))
def test_offloading_activations_changes_nothing(train: Train, name: str) -> None:
    layout, changes = OFFLOADED[name]
    offloaded, kept = train(layout, **changes, offload_activations=True), train(layout, **changes)
    assert offloaded.column("loss") == kept.column("loss")
    assert offloaded.column("grad_norm") == kept.column("grad_norm")


@pytest.mark.parametrize(
    ("layout", "method", "num_layers", "again"), [("111", "uniform", 3, 4), ("211", "block", 1, 1)]
)
def test_some_blocks_are_recomputed(train: Train, layout: str, method: str, num_layers: int, again: int) -> None:
    """Units of three and one block are all recomputed; of two blocks a stage, one is."""
    flags = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num_layers}
    recomputed, stored = train(layout, **flags), train(layout)
    assert recomputed.column("loss") == stored.column("loss")
    assert recomputed.column("grad_norm") == stored.column("grad_norm")
    for one, other in zip(recomputed.reports, stored.reports, strict=True):
        assert one["block_calls"] - other["block_calls"] == 4 * 5 * again, "micro-batches, steps, blocks"


def test_keeping_everything_is_clm_bit_for_bit(train: Train) -> None:
    everything = train("211", slm_keep_ratio=1.0)
    plain = train("211", objective="clm", reference_load=None)
    assert everything.column("loss") == plain.column("loss")
    assert everything.column("grad_norm") == plain.column("grad_norm")
    assert set(plain.column("reference_loss")) == {None}


def test_selection_is_a_choice(train: Train) -> None:
    """Guards the comparisons above: other ratios and scopes keep other tokens, and training changes."""
    base = train("111")
    assert base.column("keep_fraction") == [20 / 32] * 5  # ceil(0.6 x 32) of 32
    for other in (train("111", slm_keep_ratio=0.3), train("111", slm_scope="sequence")):
        assert other.kept != base.kept
        assert other.column("loss")[1:] != pytest.approx(base.column("loss")[1:], rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "stage"),
    some_by_default([("111", 1), ("221", 1), ("122", 1), ("112", 2), ("112", 3)], ("221", 1), ("112", 2), ("112", 3)),
)
def test_bf16_accumulates_in_fp32(train: Train, layout: str, stage: int) -> None:
    outcome = train(layout, bf16=True, deepspeed_config=zero_config(stage))
    assert outcome.reports[0]["accumulates_in"] == "torch.float32"
    assert outcome.column("loss") == pytest.approx(train("111").column("loss"), rel=0.05)


def test_evaluation_reads_every_token_once_at_any_batch_size(train: Train) -> None:
    one, other = train("111"), train("112", micro_batch_size=1, global_batch_size=6, lr=1e-9)
    still = train("111", lr=1e-9)
    losses = [next(line["loss"] for line in o.lines if line.get("event") == "eval") for o in (other, still)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert one.lines[-1]["loss"] != pytest.approx(losses[0], rel=1e-3)
