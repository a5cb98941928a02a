"""Training runs in which computations are slept out: engine, messages and collectives are real, the cores stay free.

The model is tiny, and every computation lasts as long as it is told to, however long its real products take. The time
that a rank spends in collectives inside a computation comes on top.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

VOCAB_SIZE = 1024
TIMED_STEPS = 2
STEPS_A_ROUND = TIMED_STEPS + 2
"""With the one that starts work ahead, and the one that starts none."""
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


def add_flags(parser: argparse.ArgumentParser, *, quick: str, unit_ms: float) -> None:
    """The flags of a benchmark of such runs.

    Args:
        quick: what it does by `--quick`.
        unit_ms: the default length of an emulated forward pass, in ms.
    """
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing (default 5)")
    length = f"emulated forward pass, in ms (default {unit_ms:g})"
    parser.add_argument("--unit-ms", type=float, default=unit_ms, help=length)
    parser.add_argument("--child", help=argparse.SUPPRESS)


def write_inputs(folder: Path, *, seq_length: int, shape: dict[str, int]) -> None:
    """Write a corpus of random tokens, and a reference as large as the model.

    Args:
        shape: the reference's fields of `LlamaConfig` beside the vocabulary and the length.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

    with IndexedCorpusWriter(folder / "corpus", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, VOCAB_SIZE - 1, 64 * seq_length))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=seq_length, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "reference")


def input_flags(folder: str) -> dict[str, Any]:
    """The flags that name what `write_inputs` wrote."""
    return {
        "data-path": f"{folder}/corpus",
        "reference-load": f"{folder}/reference",
        "reference-schedule": "ride-along",
        "run-dir": f"{folder}/run",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB_SIZE - 1,
    }


def built_run(words: list[str]) -> Any:
    """Build a run of these flags, on one thread a rank. Collective over the world."""
    import os

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from megatron_slm.flags.load import parse
    from megatron_slm.log import setup_logging
    from megatron_slm.parallel.groups import init_distributed
    from megatron_slm.run.plan import make_plan
    from megatron_slm.training.build import build_run

    setup_logging(int(os.environ["RANK"]))
    init_distributed()
    return build_run(make_plan(parse(words)[0], dist.get_world_size(), rank=dist.get_rank()))


def without_reference(context: Any, costs: Any, micro_batches: int) -> Any:
    """What the engine works with, for plain training on all tokens."""
    from megatron_slm.engine.schedule.modes import Mode
    from megatron_slm.engine.schedule.search import choose_schedule
    from megatron_slm.selection.selector import Selector

    objective = replace(context.objective, selector=Selector())
    return replace(context, schedule=choose_schedule(Mode.CLM, costs, micro_batches), objective=objective)


class Stopwatch:
    """Time that this rank has spent in collectives, those that it has waited for included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def watch(self) -> None:
        """Count torch.distributed's collectives from now on."""
        import torch.distributed as dist

        for name in COLLECTIVES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.running():
                work = collective(*arguments, **options)
            return work if work is None else _CountedWork(work, self)

        return counted


class _CountedWork:
    """A collective under way, whose waiting is counted."""

    def __init__(self, work: Any, stopwatch: Stopwatch) -> None:
        self._work, self._stopwatch = work, stopwatch

    def wait(self, *arguments: Any) -> Any:
        """Wait until it is done."""
        with self._stopwatch.running():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def slept_out(
    seconds_of: Callable[[Any], float], stopwatch: Stopwatch | None = None
) -> Callable[[Any], AbstractContextManager[None]]:
    """In place of the engine's timers: each computation ends when its length has passed, and its collectives'."""
    collectives = stopwatch or Stopwatch()

    @contextmanager
    def sleeping(work: Any) -> Iterator[None]:
        end = time.perf_counter() + seconds_of(work) - collectives.seconds
        yield
        time.sleep(max(0.0, end + collectives.seconds - time.perf_counter()))

    return sleeping


class Stepper:
    """Takes training steps, one after the other through the corpus."""

    def __init__(self, engine: Any, micro_batch: Callable[[int, int], Any], *, batch_size: int) -> None:
        self.engine, self.micro_batch, self.batch_size, self.step = engine, micro_batch, batch_size, 0

    def take(self, *, is_last: bool) -> None:
        """One step."""
        from megatron_slm.loss.objective import StepSettings

        source = partial(self.micro_batch, self.step * self.batch_size)
        self.engine.train_step(source, StepSettings(step=self.step), is_last=is_last)
        self.step += 1

    def time(self, context: Any) -> float:
        """Seconds of a step in the middle of a run: the prologue and the last step's form are not timed."""
        import torch
        import torch.distributed as dist

        self.engine.context = context
        self.engine.adopt(context.schedule)
        self.take(is_last=False)
        seconds = []
        for _ in range(TIMED_STEPS):
            dist.barrier()
            started = time.perf_counter()
            self.take(is_last=False)
            slowest = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds.append(float(slowest))
        self.take(is_last=True)
        return statistics.median(seconds)


def quartile_distance(values: list[float]) -> float:
    """Distance between the quartiles: the spread that reports give."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4)
    return upper - lower
