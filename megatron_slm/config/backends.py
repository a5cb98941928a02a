"""Configuration of the compute backends.

`auto` picks the fastest backend that works, else torch; a backend named explicitly is used or raises an error, never
replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Attention = Literal["sdpa", "flash", "flash3"]
Norm = Literal["torch", "apex"]
Optimizer = Literal["torch", "apex", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Implementations of attention, norms and the optimizer; results agree up to rounding."""

    attention_backend: Literal["auto", "sdpa", "flash", "flash3"] = "auto"
    """Attention. sdpa: torch's scaled_dot_product_attention. flash, flash3: flash-attn 2 and 3 (GPU, bf16; 3 on
    Hopper). auto: the fastest that works."""
    norm_backend: Literal["auto", "torch", "apex"] = "auto"
    """RMSNorm. torch: torch's operations. apex: the fused kernel of apex (GPU). auto: apex where it works."""
    optimizer_backend: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """AdamW. torch: torch's (fused on a GPU). apex: FusedAdam of apex (GPU). deepspeed: FusedAdam of DeepSpeed (GPU;
    compiled at start). auto: apex where it works, else torch."""
    compile_blocks: bool | None = None
    """Compile each decoder block with torch.compile: faster steps, of which the first take minutes longer. Not with
    ZeRO-3, sampled rows, selective recomputation, context parallelism, or documents kept apart. Default: on a GPU where
    it works."""

    compile_elementwise: bool | None = None
    """Compile norms, rotations and the gated activation, each by itself, where whole blocks are not compiled: less
    memory traffic, fewer activations. Default: on a GPU where it works."""

    def compiles_on_gpu(
        self, *, zero_stage: int, own_backward: bool, resets_documents: bool, cuts_sequences: bool
    ) -> bool:
        """Tell whether a run on GPUs compiles its blocks, if the compiler works there.

        Args:
            own_backward: the blocks' backward passes are written out (sampled rows, selective recomputation).
        """
        if self.compile_blocks is not None:
            return self.compile_blocks
        return zero_stage < 3 and not (own_backward or resets_documents or cuts_sequences)

    def fuses_elementwise_on_gpu(self, *, compiles_blocks: bool) -> bool:
        """Tell whether a run on GPUs compiles element-wise work alone, if the compiler works there."""
        return not compiles_blocks and self.compile_elementwise is not False


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Backends selected for a process."""

    attention: Attention = "sdpa"
    norm: Norm = "torch"
    optimizer: Optimizer = "torch"
    compile_blocks: bool = False
    fuses_elementwise: bool = False
    """Norms, rotations and the gated activation are compiled, each by itself."""
    notes: dict[str, str] = field(default_factory=dict, compare=False)
    """Reasons that `auto` could not take something faster, by what is computed."""

    def describe(self) -> dict[str, str]:
        """Return the selected implementation of each computation, for logs."""
        from megatron_slm import device  # imports torch, which `--help` does not need

        chosen = {
            "attention": {
                "sdpa": "torch scaled_dot_product_attention",
                "flash": "flash-attn",
                "flash3": "flash-attn 3",
            }[self.attention],
            "norm": {"torch": "torch", "apex": "apex FusedRMSNorm"}[self.norm],
            "optimizer": {
                "torch": "torch AdamW (fused)" if device.on_gpu() else "torch AdamW",
                "apex": "apex FusedAdam",
                "deepspeed": "DeepSpeed FusedAdam",
            }[self.optimizer],
            "blocks": "torch.compile" if self.compile_blocks else "eager",
            "element-wise": "torch.compile" if self.compile_blocks or self.fuses_elementwise else "eager",
        }
        return {what: f"{by} ({self.notes[what]})" if what in self.notes else by for what, by in chosen.items()}
