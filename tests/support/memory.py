"""Rank-side: train a few steps and count the bytes of tensors by what they are for."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.checkpoint.fragments import fragments
from megatron_slm.engine.flat import FlatModule
from megatron_slm.engine.pipeline import SelectiveEngine
from megatron_slm.engine.schedule.programs import Kind
from megatron_slm.flags.load import parse
from megatron_slm.loss.objective import StepSettings
from megatron_slm.loss.stash import Stash
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.run.plan import make_plan
from megatron_slm.training.build import Run, build_run
from megatron_slm.training.step import train_step
from tests.support.runs import flags

Storages = dict[int, int]
"""Bytes by address."""

GRADIENTS = ("fp32_groups_gradients_flat", "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
"""Where DeepSpeed's optimizers keep gradients, beside the parameters' own."""


class Saved:
    """What autograd keeps, where the garbage collector can see it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def storages(tensors: Iterable[Tensor]) -> Storages:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple) else []


class Meter:
    """The most bytes of each kind so far."""

    def __init__(self, run: Run) -> None:
        self.engine, self.optimizer = run.trainer.engine, run.trainer.engine.optimizer
        self.most = {"parameters": 0, "gradients": 0, "optimizer": 0, "activations": 0, "stash": 0, "buckets": 0}
        self.before: Storages = {}

    def record(self, name: str, held: Storages) -> None:
        self.most[name] = max(self.most[name], sum(held.values()))

    def parameters(self) -> Storages:
        held = list(self.engine.module.parameters())
        shares = [(p.ds_tensor, p.ds_secondary_tensor) for p in held if hasattr(p, "ds_tensor")]
        return storages(p.data for p in held) | storages(t.data for pair in shares for t in pair if t is not None)

    def gradients(self) -> Storages:
        flat = getattr(self.optimizer, "fp32_partitioned_groups_flat", [])  # with offload their gradients stay
        own = [p.grad for p in (*self.engine.module.parameters(), *flat) if p.grad is not None]
        kept = [tensors_in(getattr(self.optimizer, name, [])) for name in GRADIENTS]
        return storages([*own, *tensors_in(kept)])

    def states(self) -> Storages:
        owned = list(fragments(self.optimizer))
        return storages(t for f in owned for t in (f.flat, *tensors_in(f.state)))

    def buckets(self) -> Storages:
        buckets = getattr(self.optimizer, "ipg_buckets", {}).values()
        return storages(tensors_in([bucket.buffer for bucket in buckets]))

    def begin_step(self) -> None:
        """From here on the garbage collector lists new objects only, which are few."""
        gc.unfreeze()
        gc.collect()
        self.before = self._alive()
        gc.freeze()

    def passed_forward(self) -> None:
        """What is there now and was not before the step: kept activations; not gradients, not messages back."""
        gc.collect()
        self.record("parameters", self.parameters())
        self.record("buckets", self.buckets())
        stashes = [o for o in gc.get_objects() if type(o) is Stash]
        stash = storages(t for s in stashes for t in tensors_in([s._blocks, s._slot_N, s.max_LN]))
        self.record("stash", stash)
        other = self.before | self.gradients() | self.parameters() | self.buckets() | stash
        kept = storages(tensors_in(getattr(self.engine, "pipe_buffers", {})))
        channels = getattr(self.engine, "_channels", None)
        ends = (*channels.next.values(), *channels.previous.values()) if channels else ()
        received = tensors_in([getattr(self.engine, "grad_layer", None)])
        travelling = storages([*received, *(t for end in ends for _, t in (*end.sends, *end.receives))])
        other |= {address: size for address, size in travelling.items() if address not in kept}
        self.record("activations", {a: size for a, size in self._alive().items() if a not in other})

    @staticmethod
    def _alive() -> Storages:
        # by type, not isinstance: some objects of torch's warn when they are asked for their class
        objects = [(o, type(o)) for o in gc.get_objects()]
        seen = [o for o, kind in objects if issubclass(kind, Tensor)]
        seen += [o.tensor for o, kind in objects if kind is Saved]
        # states of random number generators, which recomputation keeps, are in the host's memory in any case
        return storages(t for t in seen if t.device.type == "cpu" and t.dtype != torch.uint8)


def measure(values: dict[str, Any]) -> dict[str, int]:
    """Bytes by part on this rank, at their most over two steps."""
    init_distributed()
    run = build_run(make_plan(parse(flags(values))[0], dist.get_world_size(), rank=dist.get_rank()))
    meter = Meter(run)
    _watch(meter)
    for step in range(2):
        meter.begin_step()
        source = partial(run.train_source.micro_batch, step * run.plan.num_micro_batches)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            train_step(run.trainer, source, StepSettings(step=step), learning_rate=1e-3, is_last=step == 1)
        meter.record("optimizer", meter.states())
    return meter.most


def _watch(meter: Meter) -> None:
    """Let the meter look after each forward pass, where gradients are reduced, and before the optimizer steps."""
    handlers, forward, step = SelectiveEngine._HANDLERS, FlatModule.forward, type(meter.optimizer).step

    def pipeline_forward(engine: Any, i: int, real: Any = handlers[Kind.FORWARD]) -> None:
        real(engine, i)
        meter.passed_forward()

    def reduce_gradients(engine: Any, i: int, real: Any = handlers[Kind.REDUCE_GRADIENTS]) -> None:
        meter.record("gradients", meter.gradients())
        meter.record("buckets", meter.buckets())
        real(engine, i)

    def flat_forward(module: FlatModule, *args: Any, **kwargs: Any) -> Any:
        result = forward(module, *args, **kwargs)
        meter.passed_forward()
        return result

    def optimizer_step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        meter.record("gradients", meter.gradients())
        return step(optimizer, *args, **kwargs)

    reduce_bucket = getattr(type(meter.optimizer), "reduce_ipg_grads", None)

    def bucket_reduced(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        meter.record("buckets", meter.buckets())
        return reduce_bucket(optimizer, *args, **kwargs)

    if reduce_bucket is not None and not isinstance(meter.engine, SelectiveEngine):  # there it is the step's bucket
        type(meter.optimizer).reduce_ipg_grads = bucket_reduced
    handlers[Kind.FORWARD], handlers[Kind.REDUCE_GRADIENTS] = pipeline_forward, reduce_gradients
    FlatModule.forward = flat_forward  # type: ignore[method-assign]
    type(meter.optimizer).step = optimizer_step
