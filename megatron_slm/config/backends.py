"""Configuration of the compute backends.

`auto` picks the fastest installed backend, else torch; a backend named explicitly is used or raises an error, never
replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Implementations of attention, norms and the optimizer; results agree up to rounding."""

    attention_backend: Literal["auto", "sdpa", "flash"] = "auto"
    """Attention. sdpa: torch's scaled_dot_product_attention. flash: flash-attn (GPU, bf16). auto: flash where it can
    run."""
    norm_backend: Literal["auto", "torch", "apex"] = "auto"
    """RMSNorm. torch: torch's operations. apex: the fused kernel of apex (GPU). auto: apex where installed."""
    optimizer_backend: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """AdamW. torch: torch's (fused on a GPU). apex: FusedAdam of apex (GPU). deepspeed: FusedAdam of DeepSpeed (GPU;
    compiled at start). auto: apex where installed, else torch."""
    compile_blocks: bool = False
    """Compile each decoder block with torch.compile. The first steps take minutes longer. Not with ZeRO-3."""


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Backends selected for a process."""

    attention: Literal["sdpa", "flash"] = "sdpa"
    norm: Literal["torch", "apex"] = "torch"
    optimizer: Literal["torch", "apex", "deepspeed"] = "torch"
    compile_blocks: bool = False

    def describe(self) -> dict[str, str]:
        """Return the selected implementation of each computation, for logs."""
        from megatron_slm import device  # imports torch, which `--help` does not need

        return {
            "attention": {"sdpa": "torch scaled_dot_product_attention", "flash": "flash-attn"}[self.attention],
            "norm": {"torch": "torch", "apex": "apex FusedRMSNorm"}[self.norm],
            "optimizer": {
                "torch": "torch AdamW (fused)" if device.on_gpu() else "torch AdamW",
                "apex": "apex FusedAdam",
                "deepspeed": "DeepSpeed FusedAdam",
            }[self.optimizer],
            "blocks": "torch.compile" if self.compile_blocks else "eager",
        }
