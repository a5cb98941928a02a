"""Time of a block's and a loss head's passes on a GPU: products, attention and memory at rates of their own. Pure.

The bytes were counted on the real code's kernels (`tools/fake_gpu`), which `tools/benchmark.py gpu-model` costs one by
one at the same rates; tests hold the two within 10 % of each other. No rate was measured on a GPU by this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_slm.config.architecture import Architecture
from megatron_slm.engine.schedule.costs import attention_flops, block_flops
from megatron_slm.planning.gpus import Cluster

PRODUCT_RATE = 0.66
"""Share of the peak that matrix products reach."""
ATTENTION_RATE = 0.38
"""Share of the peak that causal attention reaches, half of the square counted."""
MEMORY_RATE = 0.85
"""Share of the memory's bandwidth that element-wise kernels reach."""
GRADIENT_SUM_BYTES = 10
"""Read and written for each parameter and micro-batch as a bf16 gradient is added to its fp32 sum."""

_ATTENTION_BACKWARD = 2.5 / 2
"""Operations of attention's backward pass, over twice those of its forward pass: it makes the scores again."""
_LOGIT_BYTES = 8, 4
"""Read and written for each logit, forwards and backwards."""


class _Traffic(NamedTuple):
    """Bytes read and written in a forward pass in bf16, for each element."""

    norm: float
    """Of the residual stream, for each of two norms."""
    additions: float
    """Of the residual stream, for both additions to it."""
    rotation: float
    """Of queries and keys."""
    mlp: float
    """Of the MLP's inner width: SwiGLU."""
    backward: float
    """Traffic of a backward pass over that of a forward pass."""


_EAGER = _Traffic(norm=36, additions=12, rotation=48.6, mlp=10, backward=2.6)
_FUSED = _Traffic(norm=4, additions=12, rotation=4.2, mlp=6, backward=2.3)
"""Each of these is compiled to one kernel, which reads its inputs and writes its results."""


class Work(NamedTuple):
    """Operations and memory traffic."""

    flops: float
    """All operations, as MFU counts them: twice as many backwards as forwards."""
    products: float
    """FLOPs of matrix products."""
    attention: float
    """FLOPs of attention's own products, those that a backward pass makes again included."""
    num_bytes: float
    """Element-wise memory traffic."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Rates of one GPU at one precision."""

    cluster: Cluster
    bf16: bool

    def seconds(self, work: Work) -> float:
        """Time of some work; with `--efficiency` all FLOPs at that share of the peak, and nothing else."""
        peak, memory = self.cluster.gpu.flops(bf16=self.bf16), self.cluster.gpu.memory_bytes_per_second
        if self.cluster.efficiency is not None:
            return work.flops / (peak * self.cluster.efficiency)
        products, attention = work.products / (peak * PRODUCT_RATE), work.attention / (peak * ATTENTION_RATE)
        return products + attention + work.num_bytes / (memory * MEMORY_RATE)

    def gradient_sum_seconds(self, num_parameters: int) -> float:
        """Time of adding a micro-batch's gradients to their sums; nothing with `--efficiency`, which includes it."""
        if self.cluster.efficiency is not None:
            return 0.0
        return num_parameters * GRADIENT_SUM_BYTES / (self.cluster.gpu.memory_bytes_per_second * MEMORY_RATE)


def block_forward(arch: Architecture, length: int, *, tensor: int, sequence_shards: int, e: int, fused: bool) -> Work:
    """Work of a block's forward pass for one token on one of `tensor` ranks.

    Args:
        sequence_shards: ranks that share the residual stream's rows.
        e: bytes of an element.
        fused: element-wise work is compiled, by itself or in whole blocks.
    """
    attention = attention_flops(arch, length)
    rotated = (arch.num_attention_heads + max(arch.num_query_groups, tensor)) * arch.kv_channels
    traffic = _FUSED if fused else _EAGER
    stream = (2 * traffic.norm + traffic.additions) * arch.hidden_size
    inner = traffic.rotation * rotated + traffic.mlp * arch.ffn_hidden_size
    whole = block_flops(arch, length)
    return Work(
        flops=whole / tensor,
        products=(whole - attention) / tensor,
        attention=attention / tensor,
        num_bytes=(stream / sequence_shards + inner / tensor) * e / 2,
    )


def block_backward(forward: Work, *, num_passes: float, row_share: float, recomputes: bool, fused: bool) -> Work:
    """Work of its backward pass.

    Args:
        num_passes: length in forward passes by FLOPs, recomputation included, as the schedule counts it.
        row_share: share of the rows that it runs on; attention's kernel runs on all.
        fused: as in the forward pass.
    """
    whole = num_passes * forward.flops
    return Work(
        flops=whole,
        products=whole - (2 + recomputes) * forward.attention,
        attention=(2 * _ATTENTION_BACKWARD + recomputes) * forward.attention,
        num_bytes=((_FUSED if fused else _EAGER).backward * row_share + recomputes) * forward.num_bytes,
    )


def head_forward(arch: Architecture, *, tensor: int) -> Work:
    """Work of scoring one token: one product, and its logits."""
    product = 2.0 * arch.hidden_size * arch.vocab_size / tensor
    return Work(product, product, 0.0, _LOGIT_BYTES[0] * arch.vocab_size / tensor)


def head_backward(arch: Architecture, *, tensor: int, num_products: int) -> Work:
    """Work of differentiating one kept token's loss."""
    products = 2.0 * num_products * arch.hidden_size * arch.vocab_size / tensor
    return Work(products, products, 0.0, _LOGIT_BYTES[1] * arch.vocab_size / tensor)
