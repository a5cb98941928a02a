"""The model, the loss and every selection on a CUDA device without values: no mix of devices, no shape or dtype fault.

Each case is a micro-batch forward and backward. The counts that come with them have their limits in `test_counts.py`.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_slm.selection.scores import SCORES
from tests.gpu.cases import loss_head, whole_model
from tests.support.fake_gpu import FakeGpu, FakeGpuError

ATTENTIONS = ("sdpa", "flash", "flash3")
COVERING: list[dict[str, Any]] = [
    {},
    {"norm": "apex", "attention": "flash"},
    {"architecture": "tied", "layout": "tp", "recompute": True, "fuses": True},
    {"architecture": "biased", "layout": "sp", "documents": True, "attention": "flash"},
    {"architecture": "windowed", "documents": True, "recompute": True, "fuses": True},
    {"architecture": "windowed", "attention": "flash3", "hopper": False},
    {"architecture": "windowed", "hopper": False, "dtype": "float32"},
    {"layout": "dp", "selection": {"scope": "data-parallel"}, "kernels": "torch"},
    {"documents": True, "attention": "flash3", "norm": "apex", "layout": "sp", "recompute": True},
    {"layout": "context"},
    {"layout": "context", "architecture": "windowed", "attention": "flash", "documents": True},
    {"layout": "context", "architecture": "windowed", "dtype": "float32", "hopper": False, "documents": True},
]


@pytest.mark.parametrize("options", COVERING, ids=str)
def test_whole_model(fake_gpu: FakeGpu, options: dict[str, Any]) -> None:
    found = fake_gpu(whole_model, **options)
    assert "math" not in found.attention


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "tied", "biased", "windowed"])
@pytest.mark.parametrize("layout", ["one", "tp", "sp"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("documents", [False, True])
def test_whole_models(fake_gpu: FakeGpu, architecture: str, layout: str, attention: str, documents: bool) -> None:
    for recompute in (False, True):
        options = {"architecture": architecture, "layout": layout, "attention": attention, "documents": documents}
        found = fake_gpu(whole_model, **options, recompute=recompute, norm="apex" if recompute else "torch")
        assert "math" not in found.attention


@pytest.mark.parametrize(
    ("dtype", "hopper"),
    [
        ("bfloat16", True),
        ("float32", False),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
        pytest.param("float32", True, marks=pytest.mark.slow),
    ],
)
def test_windows_and_groups_never_take_the_math_path(fake_gpu: FakeGpu, dtype: str, hopper: bool) -> None:
    """Grouped heads with a window, and in fp32: what torch computes with a table of scores unless it is kept from it."""
    for architecture, documents in (("plain", False), ("windowed", False), ("windowed", True)):
        options = {"architecture": architecture, "documents": documents, "dtype": dtype, "hopper": hopper}
        taken = set(fake_gpu(whole_model, **options).attention)
        assert taken <= {"cudnn", "flash", "efficient"}
        assert "cudnn" not in taken or (hopper and not documents)


# ---- the loss head and the selections ------------------------------------------------------------------------------

EXCESS = {"scores": ("excess",), "keep_ratio": 0.6}
POLICIES = ("top-k", "sample", "weights", "threshold", "quantile")
SCOPES = ("sequence", "micro-batch", "data-parallel")


def test_every_score(fake_gpu: FakeGpu) -> None:
    for name in SCORES:
        fake_gpu(loss_head, scores=(name,), keep_ratio=0.6, kernels="triton")
    fake_gpu(loss_head, layout="tp", probes=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_scope(fake_gpu: FakeGpu, policy: str) -> None:
    for scope in SCOPES:
        layout = "dp" if scope == "data-parallel" else "one"
        options = {"policy": policy, "scope": scope, "always_keep": (1, 2), "never_keep": (3,)}
        fake_gpu(loss_head, **EXCESS, **options, layout=layout, kernels="triton", probes=scope == "sequence")


@pytest.mark.parametrize("combine", ["intersection", "union", "sum"])
def test_every_combination(fake_gpu: FakeGpu, combine: str) -> None:
    options = {"combine_ratios": (0.6, 0.6), "combine_weights": (1.0, 1.0), "kernels": "triton", "layout": "tp"}
    fake_gpu(loss_head, scores=("excess", "loss"), keep_ratio=0.6, combine=combine, **options)


@pytest.mark.parametrize("kernels", [pytest.param("torch", marks=pytest.mark.slow), "triton"])
@pytest.mark.parametrize(
    ("variant", "stash_bytes"),
    [("recompute", 2**30), ("stash", 2**30), ("stash", 2**22), ("predictive", 2**23), ("predictive", 2**30)],
)
def test_every_variant(fake_gpu: FakeGpu, variant: str, stash_bytes: int, kernels: str) -> None:
    options = {"variant": variant, "stash_bytes": stash_bytes, "kernels": kernels}
    fake_gpu(loss_head, **EXCESS, **options, layout="sp" if variant == "stash" else "one")


# ---- planted faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ("device", "Expected all tensors to be on the same device"),
        ("dtype", "expected tensors of the same dtype"),
        ("shape", "Attempting to broadcast a dimension"),
    ],
)
def test_planted_faults_are_found(fake_gpu: FakeGpu, plant: str, message: str) -> None:
    with pytest.raises(FakeGpuError, match=message):
        fake_gpu(whole_model, plant=plant)


def test_a_planted_read_is_counted(fake_gpu: FakeGpu) -> None:
    before, after = fake_gpu(whole_model).syncs, fake_gpu(whole_model, plant="item").syncs
    added = [place for place in after if place not in before]
    assert len(added) == 1
    assert re.fullmatch(r"model/block\.py:\d+: item", added[0]), added
