"""What a micro-batch asks of a GPU, counted on the fake device: waits of the host, launches, bytes; and their limits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.cases import Found, loss_head, transfer, whole_model
from tests.support.fake_gpu import FakeGpu

EXCESS: dict[str, Any] = {"scores": ("excess",), "keep_ratio": 0.6, "kernels": "triton"}
KEPT_ROWS = "loss/objective.py"
"""Where the kept rows are listed: the one place at which the host must know how many there are."""


def places(syncs: dict[str, int]) -> list[str]:
    return [place.partition(":")[0] for place, count in syncs.items() for _ in range(count)]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_micro_batch_waits_once(fake_gpu: FakeGpu, documents: bool, kernels: str) -> None:
    """Transfer, reference, model, selection, loss and backward pass of a stage that is first and last."""
    attention = "flash" if documents else "sdpa"
    found = fake_gpu(whole_model, documents=documents, attention=attention, kernels=kernels)
    assert places(found.syncs) == [KEPT_ROWS], found.syncs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fuses": True, "recompute": True, "layout": "sp", "documents": True, "attention": "flash"},
        {"layout": "context"},
    ],
    ids=str,
)
def test_sampled_rows_wait_for_nothing_more(fake_gpu: FakeGpu, options: dict[str, Any]) -> None:
    found = fake_gpu(whole_model, row_share=0.7, **options)
    assert places(found.syncs) == [KEPT_ROWS], found.syncs


def test_a_stage_without_the_loss_does_not_wait(fake_gpu: FakeGpu) -> None:
    assert fake_gpu(transfer) == {}


RATIOS: dict[str, Any] = {"scores": ("excess", "loss"), "combine_ratios": (0.6, 0.6), "combine_weights": (1.0, 1.0)}
SELECTIONS: list[dict[str, Any]] = [
    {"scope": "sequence", "always_keep": (1, 2), "never_keep": (3,)},
    {"scope": "data-parallel", "layout": "dp", "policy": "sample"},
    {"policy": "quantile", "layout": "sp"},
    {"policy": "threshold", "variant": "recompute"},
    {"policy": "positive", "keep_most": 0.8},
    {"policy": "peaking", "scope": "sequence"},
    {"policy": "weights", "weight_normalization": "mean"},
    {**RATIOS, "combine": "sum", "scope": "sequence"},
    {**RATIOS, "combine": "union"},
    {**RATIOS, "combine": "intersection", "variant": "stash"},
]


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_every_way_of_selecting_waits_once(fake_gpu: FakeGpu, options: dict[str, Any]) -> None:
    found = fake_gpu(loss_head, **{**EXCESS, **options})
    assert places(found.syncs) == [KEPT_ROWS], found.syncs


MISSED_ROWS = "loss/passes.py"
"""Where the rows that a stash missed are listed, which takes a second wait."""


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "predictive", "stash_bytes": 2**25},
        {"variant": "predictive", "stash_bytes": 2**23, "layout": "tp", **RATIOS, "combine": "sum"},
        {"variant": "stash", "stash_bytes": 2**23, "distillation": {"divergence": "kl", "weight": 0.5}, "sparse": True},
        {"variant": "predictive", "stash_bytes": 2**25, "distillation": {"divergence": "reverse-kl", "weight": 0.5}},
    ],
    ids=str,
)
def test_a_stash_that_misses_rows_waits_twice(fake_gpu: FakeGpu, options: dict[str, Any]) -> None:
    """However many chunks of rows were predicted: this micro-batch has eight."""
    found = fake_gpu(loss_head, **{**EXCESS, **options}, num_tokens=4096)
    assert places(found.syncs) == [KEPT_ROWS, MISSED_ROWS], found.syncs


def test_distillation_waits_once(fake_gpu: FakeGpu) -> None:
    for divergence in ("kl", "jsd"):
        options = {"divergence": divergence, "weight": 0.5, "temperature": 2.0}
        found = fake_gpu(loss_head, **EXCESS, distillation=options, variant="recompute")
        assert places(found.syncs) == [KEPT_ROWS], found.syncs


def test_launches_of_the_loss_head(fake_gpu: FakeGpu) -> None:
    """Independent of the vocabulary but for a handful of kernels a block, of 8192 rows."""
    sizes = {"num_tokens": 4096, "width": 256}
    small, large = (fake_gpu(loss_head, **EXCESS, **sizes, vocabulary=8192 * n) for n in (1, 4))
    forward = len(large.forward.launches) - len(small.forward.launches)
    backward = len(large.backward.launches) - len(small.backward.launches)
    assert forward <= 3 * 6
    assert backward <= 3 * 11
    assert len(large.forward.launches) + len(large.backward.launches) <= 220


def test_the_loss_head_adds_products_in_place(fake_gpu: FakeGpu) -> None:
    """The gradient of the rows is added up inside the product: no fp32 table of it beside the sum."""
    found = fake_gpu(loss_head, **EXCESS, num_tokens=4096, vocabulary=32768)
    products = [launch.op for launch in found.backward.launches if launch.flops]
    assert products.count("addmm") == 4
    assert products.count("mm") == 4
    assert not any(launch.op in ("add_", "add") and "blocks.py" in launch.place for launch in found.backward.launches)


def test_bytes_of_a_block_by_line(fake_gpu: FakeGpu) -> None:
    """Where the model's element-wise traffic is, so that a change of it is seen: bytes a token of norms and rotations."""
    tokens, width = 256, 128
    eager = bytes_by_file(fake_gpu(whole_model, architecture="plain", num_layers=1))
    assert 0 < eager["model/norm.py"] / (tokens * width) < 600
    assert 0 < eager["model/rope.py"] / (tokens * width) < 300
    fused = bytes_by_file(fake_gpu(whole_model, architecture="plain", num_layers=1, fuses=True))
    assert not fused.keys() & {"model/norm.py", "model/mlp.py"}
    assert fused["model/fused.py"] < 0.4 * sum(eager[f"model/{file}.py"] for file in ("norm", "mlp", "rope"))


def bytes_by_file(found: Found) -> dict[str, int]:
    """Of element-wise work."""
    tally: dict[str, int] = {}
    for launch in (*found.forward.launches, *found.backward.launches):
        if not launch.flops:
            file = launch.place.removeprefix("(backward of) ").partition(":")[0]
            tally[file] = tally.get(file, 0) + launch.num_bytes
    return tally
