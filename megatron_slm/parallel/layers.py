"""Linear layers and embedding, partitioned over the tensor-parallel ranks (Megatron-LM's scheme).

`ParallelLayers` implements the model's `Layers` protocol: it makes a *linear in* (from the residual stream, partitioned
by columns), a *linear out* (back into the residual stream, partitioned by rows), a vocabulary-parallel embedding and an
output weight. With one rank they are plain dense layers.

Activations are sequence-first, [s, b, d]. Under sequence parallelism the residual stream holds s / size
positions a rank; `linear_in` gathers them and `linear_out` scatters the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_slm.arithmetic import ceil_div
from megatron_slm.config.backends import Backends
from megatron_slm.errors import LayoutError
from megatron_slm.parallel.collectives import (
    all_gather_dim0,
    all_reduce_sum,
    broadcast,
    copy_to_tensor_parallel,
    enter_parallel_region,
    keep_out_of_compiled_blocks,
    leave_parallel_region,
    reduce_from_tensor_parallel,
)
from megatron_slm.parallel.gathered_linear import gathered_linear
from megatron_slm.parallel.groups import ContextParallel, TensorParallel
from megatron_slm.parallel.heads import KeyValueHeads
from megatron_slm.parallel.replay import KnownLinear, UnreadLinear, differentiate_linear_out
from megatron_slm.parallel.sequence_share import SequenceShare
from megatron_slm.parallel.shards import Part, new_parameter


def even_share(total: int, tp: TensorParallel, *, field: str) -> tuple[int, int]:
    """Return (start, length) of this rank's equal share of `total`.

    Raises:
        LayoutError: `total` is not divisible by the tensor-parallel size.
    """
    if total % tp.size:
        raise LayoutError(
            field,
            total,
            f"be divisible by --tensor-model-parallel-size ({tp.size})",
            "choose a tensor-parallel size that divides it",
        )
    length = total // tp.size
    return tp.rank * length, length


class LinearIn(nn.Module):
    """`x W^T` for one or more weights that share their input, partitioned by columns (output features).

    Args:
        prefix: prefix of each output's logical name, such as `model.layers.0.self_attn.`.
        outputs: name and full width of each output, each partitioned evenly over the ranks.
    """

    def __init__(
        self, tp: TensorParallel, prefix: str, in_features: int, outputs: dict[str, int], *, bias: bool
    ) -> None:
        super().__init__()
        self.tp = tp
        shares = {name: even_share(width, tp, field=prefix + name) for name, width in outputs.items()}
        self.widths = [length for _, length in shares.values()]

        def parts(kind: str, tail: tuple[int, ...]) -> tuple[Part, ...]:
            return tuple(
                Part(name=f"{prefix}{name}.{kind}", shape=(outputs[name], *tail), dim=0, start=start, length=length)
                for name, (start, length) in shares.items()
            )

        total = sum(self.widths)
        self.weight = new_parameter((total, in_features), parts("weight", (in_features,)))
        self.bias = new_parameter((total,), parts("bias", ())) if bias else None

    def forward(self, x_sbd: Tensor) -> tuple[Tensor, ...]:
        """[s, b, in] to one [s, b, width / size] per output; under sequence parallelism from [s / size, b, in]."""
        if self.tp.sequence_parallel:
            out = gathered_linear(x_sbd, self.weight, self.bias, self.tp)
        else:
            out = F.linear(copy_to_tensor_parallel(x_sbd, self.tp), self.weight, self.bias)
        return out.split(self.widths, dim=-1)

    def replay(self, x: Tensor, outputs: Sequence[Tensor], rows_M: Tensor | None = None) -> tuple[Tensor, ...]:
        """`forward` for a backward pass alone, its outputs being known.

        Args:
            x: [..., in].
            outputs: one [..., width / size] per output.
            rows_M: rows of the flattened x that the first output is of, [M, width / size]; None for all.
        """
        entered = enter_parallel_region(x, self.tp)
        return KnownLinear.apply(entered, self.weight, self.bias, rows_M, *outputs)


class LinearOut(nn.Module):
    """`x W^T`, partitioned by rows (input features); the ranks' partial results are summed."""

    def __init__(self, tp: TensorParallel, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.tp = tp
        start, length = even_share(in_features, tp, field=name)
        part = Part(name=f"{name}.weight", shape=(out_features, in_features), dim=1, start=start, length=length)
        self.weight = new_parameter((out_features, length), (part,))
        bias_part = Part(name=f"{name}.bias", shape=(out_features,))
        self.bias = new_parameter((out_features,), (bias_part,)) if bias else None

    def forward(self, x_sbf: Tensor) -> Tensor:
        """[s, b, in / size] to [s, b, out]; under sequence parallelism to [s / size, b, out]."""
        out = leave_parallel_region(F.linear(x_sbf, self.weight), self.tp)
        if self.bias is None:
            return out
        return out + self._bias()

    def replay(self, x_Rf: Tensor) -> Tensor:
        """`forward` for a backward pass alone: zeros in place of the product, and of the sum over the ranks."""
        out = UnreadLinear.apply(x_Rf, self.weight, self.tp)
        return out if self.bias is None else out + self._bias()

    def differentiate(self, grad_Rd: Tensor, inputs: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`replay` and its backward pass: the gradients of the inputs, [R, in / size], and of the parameters.

        Args:
            grad_Rd: of what the layer returned; under sequence parallelism of this rank's part of the rows.
            inputs: is called with the inputs' gradient, and returns them.
        """
        grad_Rf, *found = differentiate_linear_out(grad_Rd, self.weight, self.tp, inputs)
        if self.bias is not None:
            grad_d = grad_Rd.sum(0)
            found.append(all_reduce_sum(grad_d, self.tp) if self.tp.sequence_parallel else grad_d)
        return grad_Rf, found

    def _bias(self) -> Tensor:
        assert self.bias is not None, "asked for where there is one"
        return copy_to_tensor_parallel(self.bias, self.tp) if self.tp.sequence_parallel else self.bias


class VocabularyWeight(nn.Module):
    """A [vocabulary, hidden] weight, partitioned by rows; the padding rows at the end stay zero.

    The padded size depends only on `divisible_by`, never on the layout. Padding rows are not stored in checkpoints and
    are not part of any softmax.
    """

    def __init__(self, tp: TensorParallel, name: str, vocab_size: int, hidden_size: int, divisible_by: int) -> None:
        super().__init__()
        self.tp = tp
        padded = ceil_div(vocab_size, divisible_by) * divisible_by
        self.start, self.rows = even_share(padded, tp, field="padded vocabulary")
        self.length = max(0, min(vocab_size - self.start, self.rows))
        """Number of rows of tokens on this rank; the last ranks may have fewer, or none."""
        part = Part(
            name=f"{name}.weight",
            shape=(vocab_size, hidden_size),
            dim=0,
            start=min(self.start, vocab_size),
            length=self.length,
        )
        self.weight = new_parameter((self.rows, hidden_size), (part,))

    def tokens(self) -> Tensor:
        """Return the rows of tokens, without padding, [length, d]."""
        return self.weight[: self.length]  # a tensor of its own: a shared weight's is released


class VocabularyEmbedding(VocabularyWeight):
    """Embedding of token ids; each rank looks up its own rows and the results are summed."""

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """int64 [b, s] to [s, b, d]; under sequence parallelism to [s / size, b, d]."""
        ids_sb = tokens_bs.t()
        if self.tp.size == 1:
            return F.embedding(ids_sb, self.weight)
        local_sb = ids_sb - self.start
        elsewhere_sb = (local_sb < 0) | (local_sb >= self.length)
        embedded_sbd = F.embedding(local_sb.masked_fill(elsewhere_sb, 0), self.weight)
        return leave_parallel_region(embedded_sbd.masked_fill(elsewhere_sb[..., None], 0.0), self.tp)


class ParallelLayers:
    """Makes the layers of a model for one tensor-parallel rank; dense layers by default."""

    def __init__(
        self,
        tp: TensorParallel | None = None,
        *,
        context: ContextParallel | None = None,
        vocabulary_divisible_by: int = 128,
        backends: Backends | None = None,
    ) -> None:
        self.tp = tp or TensorParallel()
        self.sequence_share = SequenceShare(context or ContextParallel())
        self.vocabulary_divisible_by = vocabulary_divisible_by
        self.backends = backends or Backends()
        if self.backends.compile_blocks:
            keep_out_of_compiled_blocks()

    def share(self, count: int, *, field: str) -> int:
        """Return this rank's number of `count` heads."""
        return even_share(count, self.tp, field=field)[1]

    def key_value_heads(self, count: int) -> KeyValueHeads:
        """Return this rank's of `count` key/value heads."""
        return KeyValueHeads(self.tp, count)

    def linear_in(self, prefix: str, in_features: int, outputs: dict[str, int], *, bias: bool = False) -> LinearIn:
        """Make a `LinearIn`."""
        return LinearIn(self.tp, prefix, in_features, outputs, bias=bias)

    def linear_out(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> LinearOut:
        """Make a `LinearOut`."""
        return LinearOut(self.tp, name, in_features, out_features, bias=bias)

    def embedding(self, name: str, vocab_size: int, hidden_size: int) -> VocabularyEmbedding:
        """Make a `VocabularyEmbedding`."""
        return VocabularyEmbedding(self.tp, name, vocab_size, hidden_size, self.vocabulary_divisible_by)

    def output_weight(self, name: str, vocab_size: int, hidden_size: int) -> VocabularyWeight:
        """Make a `VocabularyWeight`."""
        return VocabularyWeight(self.tp, name, vocab_size, hidden_size, self.vocabulary_divisible_by)

    def replicated(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        """Make a parameter replicated on every rank (a norm's weight)."""
        return new_parameter(shape, (Part(name=name, shape=shape),))

    def shared(self, name: str, length: int) -> nn.Parameter:
        """Make a vector of which every rank has an equal part."""
        start, share = even_share(length, self.tp, field=name)
        return new_parameter((share,), (Part(name=name, shape=(length,), dim=0, start=start, length=share),))

    def mean_over_shares(self, x: Tensor) -> Tensor:
        """Mean over the ranks of values of their parts; gradients of all ranks' parts are summed."""
        if self.tp.size == 1:
            return x
        return copy_to_tensor_parallel(reduce_from_tensor_parallel(x, self.tp), self.tp) / self.tp.size

    @property
    def sequence_part(self) -> int:
        """Number of the part of the residual stream's positions that this rank holds."""
        context, tp = self.sequence_share.ranks, self.tp
        return context.rank * tp.size + tp.rank if tp.sequence_parallel else context.rank

    def agreed(self, value_N: Tensor) -> Tensor:
        """The first rank's value of rows that all ranks hold; each rank's own of a stream that is cut."""
        return value_N if self.tp.size == 1 or self.tp.sequence_parallel else broadcast(value_N, self.tp)

    def whole_rows(self, row_M: Tensor, num_rows: int) -> Tensor:
        """Every rank's rows of its part of `num_rows`, by their numbers in the whole residual stream."""
        if not self.tp.sequence_parallel:
            return row_M
        return all_gather_dim0(row_M + self.tp.rank * num_rows, self.tp)

    def on_sequence_shard(self, weight: Tensor) -> Tensor:
        """Prepare a replicated weight for use on the residual stream.

        Under sequence parallelism, each rank has only its own positions, so the gradient is summed over the ranks.
        """
        return copy_to_tensor_parallel(weight, self.tp) if self.tp.sequence_parallel else weight

    def on_head_share(self, weight: Tensor) -> Tensor:
        """Prepare a replicated weight for use on this rank's heads; its gradient is summed over the ranks."""
        return copy_to_tensor_parallel(weight, self.tp)
