"""Implementations that compute: what is asked for, and what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.device import on_gpu

Attention = Literal["sdpa", "flash", "flash3"]
Norm = Literal["torch", "apex"]
Optimizer = Literal["torch", "apex", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Implementations of the model's and the optimizer's computations; results agree up to rounding."""

    attention_backend: Literal["auto", "sdpa", "flash", "flash3"] = "auto"
    """Attention: torch's scaled_dot_product_attention, flash-attn 2, or flash-attn 3 (GPU, bf16; 3 on Hopper); auto:
    the fastest that works."""
    norm_backend: Literal["auto", "torch", "apex"] = "auto"
    """RMSNorm: torch's operations, or apex' fused kernel (GPU); auto: apex where it works."""
    optimizer_backend: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """AdamW: torch's (fused on a GPU), or the FusedAdam of apex or of DeepSpeed (GPU; DeepSpeed compiles its own);
    auto: apex where it works, else torch."""
    compile_blocks: bool = False
    """Compile each decoder block with torch.compile; the first steps take minutes longer. Not with ZeRO-3."""


@dataclass(frozen=True, kw_only=True)
class Backends:
    """What a process computes with."""

    attention: Attention = "sdpa"
    norm: Norm = "torch"
    optimizer: Optimizer = "torch"
    compile_blocks: bool = False
    notes: dict[str, str] = field(default_factory=dict, compare=False)
    """Reasons that `auto` could not take something faster, by what is computed."""

    def describe(self) -> dict[str, str]:
        """What is computed, and by what; for people."""
        chosen = {
            "attention": {
                "sdpa": "torch scaled_dot_product_attention",
                "flash": "flash-attn",
                "flash3": "flash-attn 3",
            }[self.attention],
            "norm": {"torch": "torch", "apex": "apex FusedRMSNorm"}[self.norm],
            "optimizer": {
                "torch": "torch AdamW (fused)" if on_gpu() else "torch AdamW",
                "apex": "apex FusedAdam",
                "deepspeed": "DeepSpeed FusedAdam",
            }[self.optimizer],
            "blocks": "torch.compile" if self.compile_blocks else "eager",
        }
        return {what: f"{by} ({self.notes[what]})" if what in self.notes else by for what, by in chosen.items()}
