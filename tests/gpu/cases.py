"""What is run on the fake CUDA device: functions for its process (see `fake_gpu.py`), which return what was counted."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fake_gpu.counting import Counter, Counts, Values
from fake_gpu.kernels import TritonKernels, compiled_elementwise, packages, torch_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backends import Backends
from megatron_slm.config.recomputation import KEEP_ALL, Recomputation
from megatron_slm.engine.flat import FlatModule
from megatron_slm.loss import blocks, selective_ce
from megatron_slm.loss.distillation import Distillation
from megatron_slm.loss.objective import Objective, OutputWeight, StepSettings
from megatron_slm.loss.torch_backend import TorchKernels
from megatron_slm.loss.variants import LossHead
from megatron_slm.model import rope
from megatron_slm.model.block import Block
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.context import cut_batch
from megatron_slm.parallel.groups import ContextParallel, DataParallel, TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.selector import Selector
from megatron_slm.types import (
    DenseDistribution,
    Distribution,
    Documents,
    MicroBatch,
    SparseDistribution,
    TokenStatistics,
)

DEVICE = torch.device("cuda")
KEEP = 0.6


class Found(NamedTuple):
    """What a case counted."""

    forward: Counts
    """Of a micro-batch: its transfer, the reference, the model, the loss and the selection."""
    backward: Counts
    attention: list[str]
    """Kernels of torch's attention that were taken."""

    @property
    def syncs(self) -> dict[str, int]:
        """Host synchronizations by place and reason."""
        return dict(Tally(f"{sync.place}: {sync.why}" for sync in (*self.forward.syncs, *self.backward.syncs)))


def parallel(kind: str) -> tuple[TensorParallel, DataParallel]:
    """`one` rank, `tp`, `sp` (with sequence parallelism) of two, or `dp` of two; of a world of fake processes."""
    if kind == "one":
        return TensorParallel(), DataParallel()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    group = dist.new_group([0, 1])
    if kind == "dp":
        return TensorParallel(), DataParallel(size=2, rank=0, group=group)
    return TensorParallel(size=2, rank=0, group=group, sequence_parallel=kind == "sp"), DataParallel()


def rows_of(where: str, length: int) -> int:
    """Rows that a mask selects: none of those that the stash misses, else the kept share."""
    return 0 if where.startswith("loss/passes.py") else max(1, int(KEEP * length))


@contextmanager
def device(*, kernels: str = "triton", num_kept: int = 100, hopper: bool = True) -> Iterator[tuple[Counter, list[str]]]:
    """The fake device, with the packages' stand-ins, and a counter that is not entered yet."""
    counter = Counter(Values(rows_of=rows_of, number=lambda _: num_kept))
    rope._rotation.cache_clear()
    with ExitStack() as stack:
        taken = stack.enter_context(torch_attention(hopper=hopper))
        stack.enter_context(packages(counter))
        stack.enter_context(compiled_elementwise(counter))
        chosen: Any = TritonKernels(counter) if kernels == "triton" else TorchKernels()
        real, selective_ce.choose_kernels = selective_ce.choose_kernels, lambda *_, **__: chosen
        stack.callback(setattr, selective_ce, "choose_kernels", real)
        stack.enter_context(FakeTensorMode())
        with counter, DEVICE:  # what a process does once
            once = torch.empty(1).device
            rope.rotation(128, SMALL["kv_channels"], 10000.0, (), 2048, once)
            blocks._multiplies_into_fp32(once, torch.bfloat16)
            counter.take()
        yield counter, taken


def micro_batch(num_samples: int, length: int, documents: Documents | None = None) -> MicroBatch:
    """On the host, as a loader makes it."""
    tokens, valid = (
        torch.zeros(num_samples, length, dtype=torch.int64),
        torch.ones(num_samples, length, dtype=torch.bool),
    )
    return MicroBatch(tokens, tokens.clone(), valid, torch.zeros(num_samples, dtype=torch.int64), None, documents)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True, "qk_norm": True},
    "biased": {"qkv_bias": True, "mlp_bias": True, "attention_output_bias": True, "rope_scaling": LLAMA3},
    "windowed": {"sliding_window": 48, "full_attention_layers": 1},
}
SMALL = {
    "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4,
    "kv_channels": 16, "vocab_size": 5000,
}  # fmt: skip


def whole_model(
    architecture: str = "plain", *, layout: str = "one", attention: Any = "sdpa", norm: Any = "torch",
    documents: bool = False, recompute: bool = False, dtype: str = "bfloat16", kernels: str = "triton",
    selection: dict[str, Any] | None = None, plant: str | None = None, hopper: bool = True, fuses: bool = False,
    row_share: float | None = None, **changes: Any,
) -> Found:  # fmt: skip
    """A micro-batch of training: to the device, the reference's losses, the model, the loss head, and back.

    Args:
        plant: a fault in a block: a CPU tensor (`device`), a read of a value (`item`), a wrong `dtype` or `shape`.
        fuses: element-wise work is compiled, each piece by itself.
        row_share: share of the rows that the blocks' backward passes draw; None for all.
    """
    rows = None if row_share is None else BackwardRows(kind="sampled", share=lambda _: row_share, key=(0,))
    context = ContextParallel()
    if layout == "context":
        tp, dp = parallel("dp")
        context, dp = ContextParallel(size=2, rank=1, group=dp.group), DataParallel()
    else:
        tp, dp = parallel(layout)
    arch = Architecture(**{**SMALL, **ARCHITECTURES[architecture], **changes})
    backends = Backends(attention=attention, norm=norm, fuses_elementwise=fuses)
    layers = ParallelLayers(tp, context=context, backends=backends)
    num_samples, length = 2, 128
    chosen = {"scores": (SCORES["excess"],), "keep_ratio": KEEP, **(selection or {})}
    objective = Objective(selector=Selector(**chosen), tp=tp, dp=dp, context=context)
    where = None
    if documents:
        ends = torch.tensor([0, 60, 128, 228, 256], dtype=torch.int32)
        where = Documents((60, 68, 100, 28), ends, torch.zeros(num_samples, length, dtype=torch.int64))
    with device(kernels=kernels, num_kept=153, hopper=hopper) as (counter, taken):
        if where is not None:
            where = Documents(where.lengths, torch.zeros(5, dtype=torch.int32), torch.zeros(2, 128, dtype=torch.int64))
        with DEVICE:
            torch.set_default_dtype(getattr(torch, dtype))
            rule = Recomputation(granularity="full") if recompute else KEEP_ALL
            model = FlatModule(arch, layers, recomputation=rule)
            shallow = replace(arch, num_layers=1, full_attention_layers=0)
            reference = FrozenStage(shallow, layers, stage=0, num_stages=1)
            torch.set_default_dtype(torch.float32)
        if plant is not None:
            _plant(plant, model)
        seen: list[Tensor] = []
        read = micro_batch(num_samples, length, where)
        with counter:
            batch = cut_batch(read, context).to(DEVICE)
            statistics = reference.statistics(reference(batch.tokens_bs, batch.documents), objective, batch)

            def head(x_sbd: Tensor, output: OutputWeight) -> tuple[Tensor, Tensor]:
                return objective.loss(x_sbd, output, batch, statistics, StepSettings(step=3))

            loss, sums = model(batch, head, seen.append, rows)
            forward = counter.take()
            loss.backward()
            backward = counter.take()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.is_cuda]
        assert not without, f"no gradient on the device: {without}"
        assert sums.is_cuda
        assert seen
    return Found(forward, backward, taken)


def _plant(kind: str, model: FlatModule) -> None:
    block = model.layers[1]
    real = block.mlp.forward

    def forward(x_sbd: Tensor) -> Tensor:
        if kind == "device":
            return real(x_sbd) + torch.ones(x_sbd.shape[-1], dtype=x_sbd.dtype, device="cpu")
        if kind == "item":
            return real(x_sbd) * (2.0 if x_sbd.sum().item() > 0 else 1.0)
        if kind == "shape":
            return real(x_sbd)[:, :, 1:]
        return real(x_sbd.float())

    block.mlp.forward = forward


def loss_head(
    *, layout: str = "one", kernels: str = "torch", variant: Any = "auto", stash_bytes: int = 2**30,
    dtype: str = "bfloat16", scores: tuple[str, ...] = (), probes: bool = False, num_sources: int = 2,
    num_tokens: int = 1024, width: int = 256, vocabulary: int = 5000, distillation: dict[str, Any] | None = None,
    sparse: bool = False, **selection: Any,
) -> Found:  # fmt: skip
    """The loss, its selection and its backward pass on hidden states, for two steps; and the probe.

    Args:
        distillation: of the reference's distribution, which is stored for a few ids where it is `sparse`.
    """
    tp, dp = parallel(layout)
    selector = Selector(scores=tuple(SCORES[name] for name in scores), **selection)
    kept = 300 if selection.get("scope") == "sequence" else 600
    head = LossHead(variant=variant, stash_bytes=stash_bytes)
    distilled = None if distillation is None else Distillation(**distillation)
    objective = Objective(
        selector=selector, tp=tp, dp=dp, head=head, num_sources=num_sources, distillation=distilled
    )  # fmt: skip
    forward, backward = Counts(), Counts()
    with device(kernels=kernels, num_kept=kept) as (counter, taken), DEVICE:
        length, rows = num_tokens // 2, vocabulary // tp.size
        shard = length // (tp.size if tp.sequence_parallel else 1)
        x_sbd = torch.empty(shard, 2, width, dtype=getattr(torch, dtype), requires_grad=True)
        weight = torch.empty(rows, width, dtype=x_sbd.dtype, requires_grad=True)
        batch = micro_batch(2, length)._replace(source_b=torch.zeros(2, dtype=torch.int64))
        loss_N = torch.empty(num_tokens)
        reference = TokenStatistics(loss_N, loss_N.clone()) if selector.needs_reference else None
        if reference is not None and distillation is not None:
            reference = reference._replace(distribution=_distribution(x_sbd, weight, num_tokens, sparse=sparse))
        output = OutputWeight(weight, 0, rows)
        with counter:
            learns = selector.policy == "quantile" or variant == "predictive"
            first = [StepSettings(step=0)] if learns else []
            for settings in (*first, StepSettings(step=5, score_threshold=0.5)):
                loss, sums = objective.loss(x_sbd, output, batch, reference, settings)
                forward = counter.take()
                loss.backward()
                backward = counter.take()
                assert sums.is_cuda
            if probes:
                objective.scored_tokens(x_sbd.detach(), output, batch, reference, settings)
        assert x_sbd.grad is not None
        assert weight.grad is not None
    return Found(forward, backward, taken)


def _distribution(x_sbd: Tensor, weight_Vd: Tensor, num_tokens: int, *, sparse: bool) -> Distribution:
    """A reference's, of the model's own shape."""
    numbers_N = torch.empty(num_tokens)
    if not sparse:
        return DenseDistribution(x_sbd.detach(), weight_Vd.detach(), numbers_N, numbers_N.clone())
    return SparseDistribution(torch.empty(num_tokens, 8, dtype=torch.int64), torch.empty(num_tokens, 8), numbers_N)


def transfer() -> dict[str, int]:
    """Waits of a micro-batch with documents on its way to a stage that is neither first nor last, and its blocks."""
    arch = Architecture(**SMALL)
    with device() as (counter, _):
        ends = torch.zeros(5, dtype=torch.int32)
        layers = ParallelLayers(TensorParallel(), backends=Backends(attention="flash"))
        with DEVICE:
            torch.set_default_dtype(torch.bfloat16)
            block = Block(arch, layers, 0)
            torch.set_default_dtype(torch.float32)
            x_sbd = torch.empty(128, 2, arch.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            rope.rotation(128, *block.self_attn.rope, x_sbd.device)
        where = Documents((60, 68, 100, 28), ends, torch.zeros(2, 128, dtype=torch.int64))
        with counter:
            batch = micro_batch(2, 128, where).to(DEVICE)
            block(x_sbd, batch.documents).sum().backward()
            return dict(Tally(f"{sync.place}: {sync.why}" for sync in counter.take().syncs))
