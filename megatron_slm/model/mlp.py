"""The gated feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.model import elementwise, fused
from megatron_slm.model.layers import Layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; SwiGLU with SiLU, GeGLU with GELU."""

    def __init__(self, arch: Architecture, layers: Layers, prefix: str) -> None:
        super().__init__()
        widths = {"gate_proj": arch.ffn_hidden_size, "up_proj": arch.ffn_hidden_size}
        self.activation_name, self.activation = arch.activation, ACTIVATIONS[arch.activation]
        self.fuses = layers.backends.fuses_elementwise and arch.activation == "silu"
        self.gate_up = layers.linear_in(prefix, arch.hidden_size, widths, bias=arch.mlp_bias)
        self.down_proj = layers.linear_out(
            f"{prefix}down_proj", arch.ffn_hidden_size, arch.hidden_size, bias=arch.mlp_bias
        )

    def forward(self, x_sbd: Tensor) -> Tensor:
        """[s, b, d] to [s, b, d]."""
        return self.down_proj(self.activate(*self.gate_up(x_sbd)))

    def activate(self, gate_sbf: Tensor, up_sbf: Tensor) -> Tensor:
        """The gated activation: [..., f] and [..., f] to [..., f]."""
        if self.fuses:
            return fused.gate(gate_sbf, up_sbf)
        active_sbf = self.activation(gate_sbf)
        return active_sbf * up_sbf if torch.is_grad_enabled() else active_sbf.mul_(up_sbf)

    def differentiate_activation(
        self, grad_Mf: Tensor, gate_Nf: Tensor, up_Nf: Tensor, row_M: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`activate` some rows, or all, without a graph, and both of its inputs' gradients: [M, f] each."""
        if not self.fuses:
            return elementwise.differentiate_gate(grad_Mf, gate_Nf, up_Nf, self.activation_name, row_M)
        gate_Mf, up_Mf = (gate_Nf, up_Nf) if row_M is None else (x.index_select(0, row_M) for x in (gate_Nf, up_Nf))
        return fused.activate(gate_Mf, up_Mf), fused.activation_gradients(grad_Mf, gate_Mf, up_Mf)
