"""Stand-ins for what a CPU build lacks on its fake device: torch's choice of attention kernels, and other packages'.

They compute nothing. They refuse what the real ones refuse, make outputs of the right shapes, and are counted as the
kernels they stand for.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fake_gpu.counting import Counter
from megatron_slm.model import fused

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def choose_attention(q: Tensor, k: Tensor, mask: Tensor | None, *, hopper: bool) -> str:
    """The kernel that torch 2.13 takes on a GPU (`sdp_utils.cpp`), of those that are enabled.

    Raises:
        RuntimeError: none takes these heads, in torch's words.
    """
    width, grouped = q.shape[-1], q.shape[1] != k.shape[1]
    half = q.dtype in _HALF
    takes = {
        "cudnn": hopper and half and width % 8 == 0 and width <= 128,
        "flash": half and mask is None and width <= 256,
        "efficient": not grouped and q.dtype != torch.float64,  # grouped heads only from torch 2.14 on
        "math": True,
    }
    enabled = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    for name, can in takes.items():
        if can and enabled[name]:
            return name
    raise RuntimeError("No available kernel. Aborting execution.")


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, hopper: bool = True, taken: list[str] | None = None,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` as it runs on a GPU."""
    name = choose_attention(q, k, attn_mask, hopper=hopper)
    if taken is not None:
        taken.append(name)
    bias = None if attn_mask is None else torch.empty_like(attn_mask, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if name == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, needs_grad, dropout_p, is_causal)[0]
    if name == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    if name == "efficient":
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, needs_grad, dropout_p, is_causal)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal)[0]


@contextmanager
def torch_attention(*, hopper: bool = True) -> Iterator[list[str]]:
    """Inside, torch's attention chooses as on a GPU; yields the names of the kernels that were taken."""
    real, taken = F.scaled_dot_product_attention, list[str]()

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return scaled_dot_product_attention(*args, **kwargs, hopper=hopper, taken=taken)

    F.scaled_dot_product_attention = attention
    try:
        yield taken
    finally:
        F.scaled_dot_product_attention = real


# ---- flash-attn ----------------------------------------------------------------------------------------------------


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[b, s, heads, width] through torch's own kernel of the same makers."""
    assert q.dtype in _HALF, "FlashAttention only support fp16 and bf16 data type"
    assert all(x.is_cuda and x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0].transpose(1, 2)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """The function that flash-attn 2 declares."""
    return _flash(q, k, v, causal)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), **options: Any,
) -> Tensor:  # fmt: skip
    """The function that flash-attn 2 declares."""
    for ends in (cu_seqlens_q, cu_seqlens_k):
        assert ends.dtype == torch.int32, f"cu_seqlens must have dtype int32, not {ends.dtype}"
        assert ends.is_cuda, "cu_seqlens must be on CUDA"
    assert type(max_seqlen_q) is int
    return _flash(q[None], k[None], v[None], causal)[0]


# ---- apex and Triton -----------------------------------------------------------------------------------------------


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counter: Counter) -> Tensor:
        assert x.is_cuda, "apex' kernels run on a GPU"
        out = torch.empty_like(x)
        counter.launch("apex rms_norm", [x, weight, out])
        ctx.save_for_backward(x, weight)
        ctx.counter = counter
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        found = torch.empty_like(x), torch.empty_like(weight)
        ctx.counter.launch("apex rms_norm backward", [grads[0], x, weight, *found])
        return *found, None


@contextmanager
def packages(counter: Counter) -> Iterator[None]:
    """Inside, flash-attn and apex can be imported."""
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func, flash.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore
    flash3 = types.ModuleType("flash_attn_interface")
    flash3.flash_attn_func = lambda q, k, v, *, causal, window_size: _flash(q, k, v, causal)  # type: ignore
    flash3.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore
    norms = types.ModuleType("apex.normalization.fused_layer_norm")
    norms.fused_rms_norm_affine = (  # type: ignore
        lambda x, weight, normalized_shape, eps=1e-6: _FusedRMSNorm.apply(x, weight, counter)
    )
    modules = {
        "flash_attn": flash,
        "flash_attn_interface": flash3,
        "apex": types.ModuleType("apex"),
        "apex.normalization": types.ModuleType("apex.normalization"),
        "apex.normalization.fused_layer_norm": norms,
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


_PASSES_OVER_INPUTS = {"norm_backward": 2}
"""How often a function's compiled code reads its inputs: once, but for sums over rows beside sums over columns."""


@contextmanager
def compiled_elementwise(counter: Counter) -> Iterator[None]:
    """Inside, what `model/fused.py` compiles is counted as one kernel that reads inputs and writes results."""
    real = fused.compiled

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with counter.paused():
                out = function(*args)
            inputs = [x for x in args if isinstance(x, Tensor)] * _PASSES_OVER_INPUTS.get(function.__name__, 1)
            counter.launch(f"compiled {function.__name__}", [*inputs, *(out if isinstance(out, tuple) else (out,))])
            return out

        return run

    fused.compiled = compiled  # type: ignore[assignment]
    try:
        yield
    finally:
        fused.compiled = real


class TritonKernels:
    """The loss head's two Triton kernels (`loss/triton_backend.py`), by what they read and write."""

    name = "triton"

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def fold(self, logits_NB: Tensor, rows: Any, column_N: Tensor, exponentials_NB: Tensor | None) -> None:
        """Implement `Kernels`."""
        assert logits_NB.stride(1) == 1
        assert column_N.dtype == torch.int64
        statistics = [rows.max_N, rows.sum_N, rows.target_N, rows.moment_N]
        self.counter.launch("triton fold", [logits_NB, exponentials_NB, column_N, *statistics])

    def gradient(
        self, x_KB: Tensor, factor_K: Tensor, column_K: Tensor, target_K: Tensor, *, max_K: Tensor | None,
        out_KB: Tensor,
    ) -> None:  # fmt: skip
        """Implement `Kernels`."""
        assert x_KB.stride(1) == out_KB.stride(1) == 1
        assert factor_K.dtype == target_K.dtype == torch.float32
        self.counter.launch("triton gradient", [x_KB, factor_K, column_K, target_K, max_K, out_KB])
