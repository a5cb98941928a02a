"""Predicted step times against the real engine, and their parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_slm.config.load import parse
from megatron_slm.engine.schedule.costs import Work
from megatron_slm.loss.objective import StepSettings
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.planning.estimates import Estimate, estimate
from megatron_slm.planning.gpus import GPUS, Cluster
from megatron_slm.planning.layouts import configured_layout
from megatron_slm.planning.planned_run import plan_run
from megatron_slm.run.plan import make_plan
from megatron_slm.training.build import build_run
from tests.support.runs import VOCAB_SIZE, flags, run_flags, save_hf_llama, write_corpus
from tests.support.world import run_world

STEP_SECONDS = 2.0
"""Stretched step time of the plain layout, so that the test's own overhead is small."""


def planned(values: dict[str, Any], world: int, *, efficiency: float | None = None) -> Estimate:
    run = plan_run(parse(flags(values))[0])
    cluster = Cluster(gpu=GPUS["h100"], num_nodes=1, gpus_per_node=world, efficiency=efficiency)
    return estimate(run, configured_layout(run, world), cluster)


def stepped(values: dict[str, Any], lengths: dict[str, tuple[float, ...]]) -> float:
    """Seconds of a step in the middle of a run whose computations take the predicted time on every stage."""
    init_distributed()
    run = build_run(make_plan(parse(flags(values))[0], dist.get_world_size(), rank=dist.get_rank()))
    engine, stage = run.trainer.engine, dist.get_rank()

    @contextmanager
    def sleeping(work: Work) -> Iterator[None]:
        end = time.perf_counter() + lengths[work.value][stage]
        yield
        time.sleep(max(0.0, end - time.perf_counter()))

    engine._timing = sleeping
    seconds = []
    for step in range(3):
        source = partial(run.train_source.micro_batch, step * run.plan.num_micro_batches)
        dist.barrier()
        started = time.perf_counter()
        run.trainer.train_step(source, StepSettings(step=step), is_last=step == 2)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds[1]


@pytest.mark.slow  # it compares times, and so needs a quiet machine
def test_steps_of_layouts_compare_as_predicted(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", num_documents=200)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 40}
    base = {"objective": "slm", "reference_load": save_hf_llama(tmp_path / "reference", **sizes), "train_iters": 3}
    base |= {"hidden_size": 24, "ffn_hidden_size": 40, "micro_batch_size": 1, "global_batch_size": 8}
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one stage": (1, {}),
        "two stages": (2, {}),
        "two stages, riding along": (2, {"reference_schedule": "ride-along"}),
        "four stages": (4, {}),
        "two stages, recomputed": (2, {"recompute_granularity": "full"}),
    }
    predicted, found = {}, {}
    for name, (stages, changes) in layouts.items():
        values = run_flags(corpus, tmp_path / name, **base, **changes, pipeline_model_parallel_size=stages)
        plan = planned(values, stages)
        predicted[name] = plan.time.schedule
        stretch = STEP_SECONDS / predicted["one stage"]
        lengths = {
            kind: tuple(stretch * seconds for seconds in getattr(plan.durations, kind))
            for kind in ("forward", "backward", "reference")
        }
        found[name] = run_world(stepped, stages, values, lengths, timeout_seconds=120)[0]
    for name in layouts:
        ratio = found[name] / found["one stage"]
        assert ratio == pytest.approx(predicted[name] / predicted["one stage"], rel=0.15), name
    assert predicted["two stages, riding along"] > 1.05 * predicted["two stages"]


def test_counted_parts_of_a_step(tmp_path: Path) -> None:
    corpus = tmp_path / "none"
    plain = run_flags(corpus, tmp_path, micro_batch_size=1, global_batch_size=8)
    one, two = (planned(plain, 1), planned(plain, 2))
    assert one.time.gradients == one.time.messages == 0.0
    assert two.time.gradients > 0
    assert two.layout.num_micro_batches == 4
    assert two.time.schedule == pytest.approx(one.time.schedule / 2, rel=1e-3)
    cut = planned({**plain, "tensor-model-parallel-size": 2}, 2)
    assert cut.time.schedule > one.time.schedule / 2  # half the work, and collectives that wait
    recomputed = planned({**plain, "recompute-granularity": "full"}, 1)
    assert 1.0 < recomputed.time.schedule / one.time.schedule < 4 / 3  # the loss head is not recomputed


def test_passes_are_counted_with_their_loss_heads(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": VOCAB_SIZE}
    slm = {"objective": "slm", "reference_load": save_hf_llama(tmp_path / "reference", **shape)}
    run = run_flags(tmp_path / "none", tmp_path, global_batch_size=8, slm_keep_ratio=0.5, **slm)
    durations = planned(run, 1, efficiency=0.4).durations
    assert durations.reference == pytest.approx(durations.forward)  # of one shape
    assert durations.backward[0] < 2 * durations.forward[0]  # unkept tokens are left out of the head's
    everything = planned({**run, "slm-keep-ratio": 1.0}, 1, efficiency=0.4).durations
    assert everything.backward[0] == pytest.approx(2 * everything.forward[0], rel=0.01)
    again = planned({**run, "slm-keep-ratio": 1.0, "loss-head-variant": "recompute"}, 1, efficiency=0.4).durations
    assert again.backward[0] > 2.01 * again.forward[0]


def test_rings_are_as_fast_as_their_narrowest_place() -> None:
    cluster = Cluster(gpu=GPUS["h100"], num_nodes=4, gpus_per_node=8, link_efficiency=1.0)
    link, network = 450e9, 50e9
    assert cluster.ring_bytes_per_second(8, 1) == link
    assert cluster.ring_bytes_per_second(4, 8) == network  # one GPU a node
    assert cluster.ring_bytes_per_second(16, 2) == 4 * network  # four of each node take part
    assert cluster.ring_bytes_per_second(32, 1) == 8 * network
    assert cluster.hop_bytes_per_second(4) == link
    assert cluster.hop_bytes_per_second(8) == network
