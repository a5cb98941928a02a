"""The Triton kernels in Triton's interpreter (on CPU tensors), against fp64 and against the torch backend.

The interpreter is silently wrong for bf16 arithmetic, and truncates where a GPU rounds when it stores bf16; the
kernels compute in fp32 and only store bf16, so one unit in the last place is allowed there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_slm.errors import ConfigError
from megatron_slm.loss import LossHead, kernels, triton_backend
from megatron_slm.loss.row_statistics import RowStatistics
from megatron_slm.loss.torch_backend import TorchKernels
from tests.loss.heads import Problem, check, oracle, ours

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it has no builds for this platform)"
)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles its kernels for it")


@pytest.fixture
def triton_kernels() -> kernels.Kernels:
    return kernels.choose_kernels("triton", on_gpu=False)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["recompute", "stash", "predictive"])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (9, 7), (33, 1000), (20, 2051)])
def test_whole_loss(rows: int, vocab: int, variant: Any, dtype: torch.dtype) -> None:
    head = LossHead(backend="triton", variant=variant)
    check(Problem.random(rows, vocab, dtype=dtype), 0.6, head, 1e-10 if dtype == torch.float64 else 1e-5)


@interpreted
def test_all_rows_masked() -> None:
    p = Problem.random(9, 7)
    p.valid_N[:] = False
    assert check(p, 0.6, LossHead(backend="triton"), 1e-10).tolist() == []


@interpreted
@pytest.mark.parametrize("variant", ["recompute", "stash"])
def test_bf16(variant: Any) -> None:
    p = Problem.random(40, 1000, width=32, dtype=torch.bfloat16)
    result = ours(p, 0.6, LossHead(backend="triton", variant=variant))
    result.loss_sum.backward()
    found, truth = p.gradients(), p.in_fp64()
    expected, kept, losses = oracle(truth, 0.6)
    expected.backward()
    assert result.selection.kept_K.tolist() == kept.tolist()
    assert (result.statistics.loss_N - losses).abs().max() <= 1e-5
    for gradient, exact in zip(found, truth.gradients(), strict=True):
        assert (gradient.double() - exact).norm() / exact.norm() < 2**-7


@interpreted
def test_fold_as_torch_does(triton_kernels: kernels.Kernels) -> None:
    """Several blocks, labels in and outside of them, entropies, strided bf16 output, a row that is not finite."""
    g = torch.Generator().manual_seed(0)
    like = torch.zeros(13, 4)
    ours_, torch_ = (RowStatistics.of_no_logits(like, with_entropy=True) for _ in range(2))
    for width in (300, 64, 5):
        logits = torch.randn(13, width, generator=g) * 5
        logits[4, 2] = torch.nan
        column = torch.randint(-1, width, (13,), generator=g)
        memory = torch.zeros(2, 13, 400, dtype=torch.bfloat16)
        kept = memory[0, :, :width], memory[1, :, :width]
        triton_kernels.fold(logits.clone(), ours_, column, kept[0])
        TorchKernels().fold(logits.clone(), torch_, column, kept[1])
        others = torch.arange(13) != 4
        assert (kept[0][others].float() - kept[1][others].float()).abs().max() <= 2**-8
        assert (memory[:, :, width:] == 0).all()
    for one, other in zip(ours_.stacked(), torch_.stacked(), strict=True):
        assert torch.allclose(one[others], other[others], rtol=1e-6, atol=1e-6)
    assert ours_.sum_N[4].isnan()


@interpreted
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_gradient_as_torch_does(triton_kernels: kernels.Kernels, from_logits: bool, out_dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 100, generator=g) * 3 if from_logits else torch.rand(9, 100, generator=g).bfloat16()
    column = torch.tensor([-1, 0, 99, 5, -1, 50, 7, 7, 1])
    factor, target = torch.rand(9, generator=g), -torch.rand(9, generator=g)
    max_K = x.float().amax(1) if from_logits else None
    outs = [torch.zeros(9, 100, dtype=out_dtype) for _ in range(2)]
    for backend, out in zip((triton_kernels, TorchKernels()), outs, strict=True):
        backend.gradient(x.clone(), factor, column, target, max_K=max_K, out_KB=out)
    tolerance = 2**-6.9 if out_dtype == torch.bfloat16 else 1e-6  # one unit in the last place is at most 2^-7
    assert torch.allclose(outs[0].float(), outs[1].float(), rtol=tolerance, atol=1e-7)
    assert outs[0][2, 99].item() == pytest.approx(target[2].item(), rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Both backends on the device, against each other: the same kept rows, gradients within the dtype's rounding."""
    p = Problem.random(600, 5003, width=64, dtype=dtype).on("cuda")
    outcomes = []
    for backend in ("torch", "triton"):
        result = ours(p, 0.6, LossHead(backend=backend))
        result.loss_sum.backward()
        outcomes.append((result.selection.kept_K, *p.gradients()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for one, other in zip(outcomes[0][1:], outcomes[1][1:], strict=True):
        assert (one - other).norm() / other.norm() < (1e-5 if dtype == torch.float32 else 2**-7)


def test_backends_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"--loss-head-backend is 'triton': must be torch or auto on a CPU"):
        kernels.choose_kernels("triton", on_gpu=False)
    assert kernels.choose_kernels("auto", on_gpu=False).name == "torch"
    kernels.triton_problem.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="works here \\(triton: not installed\\)"):
        kernels.choose_kernels("triton", on_gpu=True)
    assert kernels.choose_kernels("auto", on_gpu=True).name == "torch"
    kernels.triton_problem.cache_clear()


def test_a_triton_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, and without a compiler, a driver or a GPU: found by compiling, not by its name."""
    kernels.triton_problem.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend.TritonKernels, "fold", _without_a_compiler)
    assert kernels.choose_kernels("auto", on_gpu=True).name == "torch"
    with pytest.raises(ConfigError, match="a trial fails: RuntimeError: Failed to find C compiler"):
        kernels.choose_kernels("triton", on_gpu=True)
    kernels.triton_problem.cache_clear()


def _without_a_compiler(*_: Any) -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
