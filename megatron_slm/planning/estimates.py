"""A layout's memory and speed together, and the search for the best one. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_slm.engine.schedule.costs import training_flops
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.search import MAX_COMPUTATIONS, choose_schedule
from megatron_slm.engine.schedule.simulate import Simulation
from megatron_slm.errors import LayoutError
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.job import Job
from megatron_slm.planning.layouts import Layout, candidate_layouts
from megatron_slm.planning.memory import OneForwardOneBackward, StageMemory, stage_memory
from megatron_slm.planning.throughput import Durations, StepTime, stage_durations, step_time

SEARCHED_COMPUTATIONS = 60_000
"""What a search may spend on the schedule of one of its layouts; a run itself spends more, and finds no worse one."""
EQUAL = 0.002
"""Step times this close are as good as equal."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a layout needs and gives."""

    layout: Layout
    stages: tuple[StageMemory, ...]
    durations: Durations
    time: StepTime
    simulation: Simulation
    tokens_per_step: int
    num_steps: int
    model_flops_per_second: float
    """Of the whole world at this speed, counted as for MFU."""
    cluster: Cluster
    peak_flops: float
    """Of one GPU."""

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's tensors leave the share of memory that is not theirs."""
        return self.peak_bytes <= self.cluster.usable_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of the whole world."""
        return self.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak of all GPUs."""
        return self.model_flops_per_second / (self.peak_flops * self.cluster.num_gpus)

    @property
    def days(self) -> float:
        """Of the whole run; evaluation and checkpoints are not in it."""
        return self.num_steps * self.time.total / 86400

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.cluster.num_gpus

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds and tokens."""
        return {
            "layout": self.layout.to_dict(),
            "flags": self.layout.flags(),
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "usable_bytes": int(self.cluster.usable_bytes),
            "stages": [stage.to_dict() for stage in self.stages],
            "step_seconds": {**asdict(self.time), "total": self.time.total},
            "step_over_clm": self.simulation.ratio,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "steps": self.num_steps,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
        }


def estimate(job: Job, layout: Layout, cluster: Cluster, *, max_computations: int = MAX_COMPUTATIONS) -> Estimate:
    """Plan one layout.

    Args:
        max_computations: what the search for its schedule may spend; default: what a run spends.

    Raises:
        LayoutError: a model cannot be cut that way.
    """
    durations = stage_durations(job, layout, cluster)
    costs = durations.costs
    flag = job.config.parallel.reference_schedule
    mode = Mode.of_run(flag, num_stages=layout.pipeline, has_reference=job.reference is not None)
    simulation = Simulation(choose_schedule(mode, costs, layout.num_micro_batches, max_computations=max_computations))
    seconds = simulation.step_ticks * durations.seconds_per_tick
    time = step_time(job, layout, cluster, schedule_seconds=seconds)
    samples = layout.num_micro_batches * layout.micro_batch_size * layout.data
    tokens = samples * job.config.data.seq_length
    return Estimate(
        layout=layout,
        stages=tuple(stage_memory(job, layout, simulation)),
        durations=durations,
        time=time,
        simulation=simulation,
        tokens_per_step=tokens,
        num_steps=job.config.training.train_iters,
        model_flops_per_second=training_flops(job.architecture, job.config.data.seq_length) * tokens / time.total,
        cluster=cluster,
        peak_flops=cluster.gpu.flops(bf16=job.config.training.bf16),
    )


def search(job: Job, cluster: Cluster, *, num_results: int) -> list[Estimate]:
    """The fastest layouts that fit, best first: for each tensor and pipeline size and ZeRO stage the best of its kind.

    Layouts are taken up in the order of a bound that their steps cannot beat, so the search ends, with the same
    results as if it had gone through all, once the bound is behind what it has found.

    Raises:
        LayoutError: no layout can be cut, or none fits.
    """
    bounds: list[tuple[float, int, Layout]] = []
    found = smallest = 0
    for layout in candidate_layouts(job, cluster.num_gpus, max_tensor=cluster.gpus_per_node):
        found += 1
        kept = OneForwardOneBackward(layout.pipeline, layout.num_micro_batches)
        peak = max(stage.total for stage in stage_memory(job, layout, kept))
        smallest = min(smallest or peak, peak)
        if peak <= cluster.usable_bytes:
            least = stage_durations(job, layout, cluster).least_step_seconds(layout.num_micro_batches)
            bounds.append((step_time(job, layout, cluster, schedule_seconds=least).total, found, layout))
    if not bounds:
        raise _nothing_fits(job, cluster, found, smallest)
    best: dict[tuple[int, int, int], Estimate] = {}
    for bound, _, layout in sorted(bounds):
        ranked = sorted(best.values(), key=lambda e: e.time.total)[:num_results]
        if len(ranked) == num_results and bound > ranked[-1].time.total * (1 + EQUAL):
            break
        key = (layout.tensor, layout.pipeline, layout.zero_stage)
        if key in best and bound > best[key].time.total * (1 + EQUAL):
            continue
        planned = estimate(job, layout, cluster, max_computations=SEARCHED_COMPUTATIONS)
        if planned.fits and (key not in best or _is_better(planned, best[key])):
            best[key] = planned
    if not best:  # what schedules keep ahead was too much
        raise _nothing_fits(job, cluster, found, smallest)
    return sorted(best.values(), key=lambda e: e.time.total)[:num_results]


def _is_better(one: Estimate, other: Estimate) -> bool:
    """Faster; or as fast, and without recomputation or with larger micro-batches, which keep a GPU busier."""
    if abs(one.time.total - other.time.total) > EQUAL * other.time.total:
        return one.time.total < other.time.total
    ours, theirs = one.layout, other.layout
    return (not ours.recomputes, ours.micro_batch_size) > (not theirs.recomputes, theirs.micro_batch_size)


def _nothing_fits(job: Job, cluster: Cluster, found: int, smallest: int) -> LayoutError:
    if found == 0:
        return LayoutError(
            "--global-batch-size",
            job.config.training.global_batch_size,
            f"can be cut over {cluster.num_gpus} GPUs with some micro-batch size, and the models too",
            "choose a multiple of the number of GPUs, or another number of nodes",
        )
    return LayoutError(
        "--gpu",
        f"{cluster.usable_bytes / 2**30:.1f} GiB usable",
        f"holds one of {found} layouts on {cluster.num_gpus} GPUs (the smallest needs {smallest / 2**30:.1f} GiB)",
        "plan for more nodes, larger GPUs, or a smaller --micro-batch-size and --loss-head-stash-mib",
    )
