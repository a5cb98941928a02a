"""Which implementations compute: what is asked for, and what this process can run.

`auto` takes the fastest that is installed and falls back to torch's own; whatever is asked for by name is used or
refused, never replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.device import on_gpu


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Implementations of the model's and the optimizer's computations; results agree up to rounding."""

    attention_backend: Literal["auto", "sdpa", "flash"] = "auto"
    """Attention: torch's scaled_dot_product_attention, or flash-attn (GPU, bf16); auto: flash where it can run."""
    norm_backend: Literal["auto", "torch", "apex"] = "auto"
    """RMSNorm: torch's operations, or apex' fused kernel (GPU); auto: apex where it is installed."""
    optimizer_backend: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """AdamW: torch's (fused on a GPU), or the FusedAdam of apex or of DeepSpeed (GPU; DeepSpeed compiles its own);
    auto: apex where it is installed, else torch."""
    compile_blocks: bool = False
    """Compile each decoder block with torch.compile; the first steps take minutes longer. Not with ZeRO-3."""


@dataclass(frozen=True, kw_only=True)
class Backends:
    """What a process computes with."""

    attention: Literal["sdpa", "flash"] = "sdpa"
    norm: Literal["torch", "apex"] = "torch"
    optimizer: Literal["torch", "apex", "deepspeed"] = "torch"
    compile_blocks: bool = False

    def describe(self) -> dict[str, str]:
        """For people; what is computed, and by what."""
        return {
            "attention": {"sdpa": "torch scaled_dot_product_attention", "flash": "flash-attn"}[self.attention],
            "norm": {"torch": "torch", "apex": "apex FusedRMSNorm"}[self.norm],
            "optimizer": {
                "torch": "torch AdamW (fused)" if on_gpu() else "torch AdamW",
                "apex": "apex FusedAdam",
                "deepspeed": "DeepSpeed FusedAdam",
            }[self.optimizer],
            "blocks": "torch.compile" if self.compile_blocks else "eager",
        }
