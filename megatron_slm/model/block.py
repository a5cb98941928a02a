"""A decoder block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.recomputation import Granularity
from megatron_slm.model.attention import Attention
from megatron_slm.model.layers import Layers
from megatron_slm.model.mlp import MLP
from megatron_slm.model.norm import RMSNorm
from megatron_slm.model.rope import rotation
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.model.sampled_block import SampledBlock
from megatron_slm.model.selective_block import SelectiveBlock
from megatron_slm.types import Documents

COMPILER = "inductor"
"""torch.compile's backend."""


NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Names of the norms before and after attention, and before and after the MLP, by placement; None for no norm."""


class Block(nn.Module):
    """Attention and MLP, each with a residual connection around it, and norms before or after it, or both."""

    def __init__(self, arch: Architecture, layers: Layers, index: int) -> None:
        super().__init__()
        self.layers, self.index = layers, index
        prefix = f"model.layers.{index}."

        def norm(name: str | None) -> nn.Module:
            if name is None:
                return nn.Identity()
            return RMSNorm(
                layers,
                f"{prefix}{name}",
                arch.hidden_size,
                arch.norm_epsilon,
                zero_centered=arch.zero_centered_norms,
            )

        before_attention, after_attention, before_mlp, after_mlp = NORMS[arch.norm_placement]
        self.attention_norm, self.attention_output_norm = norm(before_attention), norm(after_attention)
        self.self_attn = Attention(arch, layers, f"{prefix}self_attn.", index=index)
        self.mlp_norm, self.mlp_output_norm = norm(before_mlp), norm(after_mlp)
        self.mlp = MLP(arch, layers, f"{prefix}mlp.")
        self.residual_multiplier = arch.residual_multiplier

    def forward(
        self,
        x_sbd: Tensor,
        documents: Documents | None = None,
        rows: BackwardRows | None = None,
        recompute: Granularity | None = None,
    ) -> Tensor:
        """[s, b, d] to [s, b, d].

        Args:
            documents: document boundaries; None to attend to whole samples.
            rows: choice of the rows that the backward pass runs on; None for all.
            recompute: what the backward pass computes again; of all rows, `full` is the caller's to do.
        """
        if rows is not None:
            return SampledBlock.apply(self, documents, rows, recompute, x_sbd, *self.parameters())
        if recompute == "selective":
            return SelectiveBlock.apply(self, documents, x_sbd, *self.parameters())
        attended_sbd = self.attention_output_norm(self.self_attn(self.attention_norm(x_sbd), documents))
        x_sbd = x_sbd + self.scaled(attended_sbd)
        return x_sbd + self.scaled(self.mlp_output_norm(self.mlp(self.mlp_norm(x_sbd))))

    def scaled(self, branch: Tensor) -> Tensor:
        """Scale what attention or MLP add to the residual stream, or the gradient that they get from it."""
        return branch if self.residual_multiplier == 1.0 else branch * self.residual_multiplier


def compile_blocks(model: nn.Module) -> None:
    """Compile every decoder block of `model` in place; parameters keep their names.

    Blocks are compiled separately: equal blocks share compiled code, and a whole stage would take far longer.
    """
    torch.compiler.assume_constant_result(rotation)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=COMPILER, dynamic=False)
