"""What a micro-batch asks of a GPU, counted on the fake device: waits of the host, launches, bytes; and their limits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.cases import loss_head, transfer, whole_model
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


def test_a_stage_without_the_loss_does_not_wait(fake_gpu: FakeGpu) -> None:
    assert fake_gpu(transfer) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "sequence", "always_keep": (1, 2), "never_keep": (3,)},
        {"scope": "data-parallel", "layout": "dp", "policy": "sample"},
        {"policy": "quantile", "layout": "sp"},
        {"policy": "threshold", "variant": "recompute"},
    ],
    ids=str,
)
def test_every_way_of_selecting_waits_once(fake_gpu: FakeGpu, options: dict[str, Any]) -> None:
    found = fake_gpu(loss_head, **EXCESS, **options)
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
    found = fake_gpu(whole_model, architecture="plain", num_layers=1)
    by_file: dict[str, int] = {}
    for launch in (*found.forward.launches, *found.backward.launches):
        if not launch.flops:
            file = launch.place.removeprefix("(backward of) ").partition(":")[0]
            by_file[file] = by_file.get(file, 0) + launch.num_bytes
    tokens, width = 256, 128
    assert 0 < by_file["model/norm.py"] / (tokens * width) < 600
    assert 0 < by_file["model/rope.py"] / (tokens * width) < 300
