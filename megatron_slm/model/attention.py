"""Causal grouped-query attention.

Shapes: s sequence, b micro-batch, d hidden, h query heads of this rank, g key/value heads of this rank, k width of a
head, N = b * s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.model import elementwise, flash, flash3, fused, sdpa
from megatron_slm.model.capped_attention import CappedAttention
from megatron_slm.model.cut_sequences import attend_from
from megatron_slm.model.layers import Layers
from megatron_slm.model.norm import RMSNorm, SharedRMSNorm
from megatron_slm.model.rope import hashable, rotate, rotation
from megatron_slm.types import Documents

Angles = tuple[Tensor, Tensor]
"""Cosine and sine."""
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of heads, by cosine and sine."""


class Attention(nn.Module):
    """`softmax(Q K^T / sqrt(k)) V` over all positions up to the current one, or a sliding window of them.

    Args:
        index: number of the block.
    """

    def __init__(self, arch: Architecture, layers: Layers, prefix: str, *, index: int) -> None:
        super().__init__()
        self.width, self.window = arch.kv_channels, arch.window_of(index)
        kernels = {"sdpa": sdpa, "flash": flash, "flash3": flash3}[layers.backends.attention]
        self.attend, self.attend_in_documents = kernels.attend, kernels.attend_in_documents
        self.attend_in_pieces, self.sequence_share = kernels.attend_in_pieces, layers.sequence_share
        if arch.attention_softcap is not None:
            capped = CappedAttention(arch.attention_softcap)
            self.attend, self.attend_in_documents = capped.attend, capped.attend_in_documents
            self.attend_in_pieces = capped.attend_in_pieces
        self.num_heads = layers.share(arch.num_attention_heads, field="number of attention heads")
        self.kv_heads = layers.key_value_heads(arch.num_query_groups)
        q, kv = arch.num_attention_heads * self.width, arch.num_query_groups * self.width
        self.qkv = layers.linear_in(
            prefix, arch.hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=arch.qkv_bias
        )
        self.o_proj = layers.linear_out(f"{prefix}o_proj", q, arch.hidden_size, bias=arch.attention_output_bias)
        norm = partial(
            RMSNorm,
            layers,
            hidden_size=self.width,
            epsilon=arch.norm_epsilon,
            over_heads=True,
            zero_centered=arch.zero_centered_norms,
        )
        self.q_norm = norm(f"{prefix}q_norm") if arch.qk_norm else nn.Identity()
        self.k_norm = norm(f"{prefix}k_norm") if arch.qk_norm else nn.Identity()
        whole = partial(SharedRMSNorm, layers, epsilon=arch.norm_epsilon)
        self.whole_q_norm = whole(f"{prefix}q_norm", width=q) if arch.qk_norm_of_all_heads else nn.Identity()
        self.whole_k_norm = whole(f"{prefix}k_norm", width=kv) if arch.qk_norm_of_all_heads else nn.Identity()
        base, scaling = arch.rotary_base, hashable(arch.rope_scaling)
        if self.window is not None and arch.local_rotary_base is not None:
            base, scaling = arch.local_rotary_base, ()
        self.rope = (arch.rotary_width, base, scaling, arch.max_position_embeddings)
        fuses = layers.backends.fuses_elementwise and not arch.rotary_interleaved
        self.rotate = fused.rotate if fuses else partial(rotate, interleaved=arch.rotary_interleaved)
        rotate_by_hand, rotate_unread = elementwise.rotations(interleaved=arch.rotary_interleaved)
        self.rotate_by_hand = fused.rotate if fuses else rotate_by_hand
        """`rotate` for the backward pass of a sampled block."""
        self.rotate_unread = fused.rotate if fuses else rotate_unread
        """The same where only the gradient matters."""
        self.rotates = arch.rotates(index)
        self.query_multiplier = arch.query_multiplier

    def forward(self, x_sbd: Tensor, documents: Documents | None = None) -> Tensor:
        """[s, b, d] to [s, b, d].

        Args:
            documents: document boundaries; None to attend to whole samples.
        """
        return self.o_proj(self.mix(*self.qkv(x_sbd), documents=documents))

    def mix(self, q_sbf: Tensor, k_sbf: Tensor, v_sbf: Tensor, *, documents: Documents | None) -> Tensor:
        """Attention without its projections: queries, keys and values as they were projected here to [s, b, h * k].

        Args:
            documents: document boundaries; None to attend to whole samples.
        """
        angles = self.angles(len(q_sbf), documents, q_sbf.device)
        q_sbhk = self.query_heads(q_sbf, angles, self.rotate)
        return self.core(q_sbhk, *self.key_value_heads(k_sbf, v_sbf, angles, self.rotate), documents=documents)

    def angles(self, held: int, documents: Documents | None, device: torch.device) -> Angles | None:
        """Return cosine and sine by which the positions held here are rotated, [s, b or 1, 1, r / 2] each; None for no
        rotation.
        """
        if not self.rotates:
            return None
        cos, sin = rotation(self.sequence_share.whole_length(held), *self.rope, device)
        if documents is not None and documents.position_bs is not None:
            position_sb = documents.position_bs.t()
            return cos[position_sb, 0], sin[position_sb, 0]
        return self.sequence_share.held(cos), self.sequence_share.held(sin)

    def query_heads(self, q_sbf: Tensor, angles: Angles | None, rotate: Rotation) -> Tensor:
        """Normalize and rotate queries, [s, b, h * k] to [s, b, h, k]; of some positions, with their angles, too."""
        q_sbhk = self.q_norm(self.whole_q_norm(q_sbf).unflatten(-1, (self.num_heads, self.width)))
        if angles is not None:
            q_sbhk = rotate(q_sbhk, *angles)
        return q_sbhk if self.query_multiplier == 1.0 else q_sbhk * self.query_multiplier

    def key_value_heads(
        self, k_sbf: Tensor, v_sbf: Tensor, angles: Angles | None, rotate: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Normalize and rotate keys, [s, b, g * k] to [s, b, g, k], and cut values into heads."""
        k_sbf, v_sbf = self.kv_heads.whole(self.whole_k_norm(k_sbf), v_sbf)
        k_sbgk = self.k_norm(k_sbf.unflatten(-1, (self.kv_heads.count, self.width)))
        v_sbgk = v_sbf.unflatten(-1, (self.kv_heads.count, self.width))
        return (k_sbgk if angles is None else rotate(k_sbgk, *angles)), v_sbgk

    def core(
        self,
        q_sbhk: Tensor,
        k_sbgk: Tensor,
        v_sbgk: Tensor,
        *,
        documents: Documents | None,
        sparse_gradient: bool = False,
    ) -> Tensor:
        """Attend: queries to keys and values as they are, [s, b, h * k].

        Args:
            documents: document boundaries; None to attend to whole samples.
            sparse_gradient: many rows of the result's gradient will be zero; kernels that can skip them do.
        """
        share, held = self.sequence_share, q_sbhk.shape[0]
        if share.is_cut:
            runs = share.stretches(share.whole_length(held))
            attend = partial(attend_from, runs, self.attend, self.attend_in_pieces, q_sbhk)
            out_sbhk = share.over_whole(
                lambda k_sbgk, v_sbgk: attend(k_sbgk, v_sbgk, self.window, documents), k_sbgk, v_sbgk
            )
        elif documents is None or documents.lengths is None:
            out_sbhk = self.attend(q_sbhk, k_sbgk, v_sbgk, self.window, sparse_gradient=sparse_gradient)
        else:
            # concatenate samples: [s, b, heads, k] to [N, heads, k], and back
            length, num_samples = q_sbhk.shape[:2]
            q_Nhk, k_Ngk, v_Ngk = (x.transpose(0, 1).flatten(0, 1) for x in (q_sbhk, k_sbgk, v_sbgk))
            out_Nhk = self.attend_in_documents(
                q_Nhk, k_Ngk, v_Ngk, self.window, documents, sparse_gradient=sparse_gradient
            )
            out_sbhk = out_Nhk.unflatten(0, (num_samples, length)).transpose(0, 1)
        return out_sbhk.flatten(-2)
