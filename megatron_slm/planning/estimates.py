"""Estimates a layout's memory and speed, and searches for the fastest layouts. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_slm.config.batch_sizes import SCHEDULE
from megatron_slm.engine.schedule.costs import training_flops
from megatron_slm.engine.schedule.modes import Mode
from megatron_slm.engine.schedule.search import MAX_COMPUTATIONS, choose_schedule
from megatron_slm.engine.schedule.simulate import Simulation
from megatron_slm.errors import LayoutError
from megatron_slm.planning.building import BuildMemory, build_memory
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.layouts import GRANULARITIES, Layout, candidate_layouts
from megatron_slm.planning.memory import OneForwardOneBackward, StageMemory, stage_memory
from megatron_slm.planning.planned_run import PlannedRun
from megatron_slm.planning.throughput import Durations, StepTime, stage_durations, step_time
from megatron_slm.progress import track

SEARCHED_COMPUTATIONS = 60_000
"""Budget of the schedule search for each layout of `search`; a run has a larger one and finds no worse schedule."""
EQUAL = 0.002
"""Relative difference up to which step times count as equal."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory, step time and throughput of a layout."""

    layout: Layout
    stages: tuple[StageMemory, ...]
    durations: Durations
    time: StepTime
    simulation: Simulation
    tokens_per_step: int
    num_steps: int
    model_flops_per_second: float
    """FLOP/s of all GPUs, counted as for MFU."""
    cluster: Cluster
    peak_flops: float
    """Peak FLOP/s of one GPU."""
    building: BuildMemory

    @property
    def peak_bytes(self) -> int:
        """Memory of the rank that needs most."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """True if the tensors of every rank fit into the usable memory, in training and while the models are built."""
        return self.peak_bytes <= self.cluster.usable_bytes and self.building.fits(self.cluster)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs."""
        return self.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak of all GPUs."""
        return self.model_flops_per_second / (self.peak_flops * self.cluster.num_gpus)

    @property
    def days(self) -> float:
        """Duration of the run, without evaluation and checkpoints."""
        return self.num_steps * self.time.total / 86400

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the run."""
        return self.days * 24 * self.cluster.num_gpus

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values in bytes, seconds and tokens."""
        return {
            "layout": self.layout.to_dict(),
            "flags": self.layout.flags(),
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "usable_bytes": int(self.cluster.usable_bytes),
            "stages": [stage.to_dict() for stage in self.stages],
            "building": self.building.to_dict(),
            "step_seconds": {**asdict(self.time), "total": self.time.total},
            "step_over_clm": self.simulation.ratio,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "steps": self.num_steps,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
        }


def estimate(
    run: PlannedRun, layout: Layout, cluster: Cluster, *, max_computations: int = MAX_COMPUTATIONS
) -> Estimate:
    """Estimate one layout.

    Args:
        max_computations: budget of the schedule search; default: that of a run.

    Raises:
        LayoutError: a model cannot be sharded in this way.
    """
    durations = stage_durations(run, layout, cluster)
    costs = durations.costs
    flag = run.config.parallel.reference_schedule
    mode = Mode.of_run(flag, num_stages=layout.pipeline, has_reference=run.reference is not None)
    simulation = Simulation(choose_schedule(mode, costs, layout.num_micro_batches, max_computations=max_computations))
    seconds = simulation.step_ticks * durations.seconds_per_tick
    time = step_time(run, layout, cluster, schedule_seconds=seconds)
    samples = layout.num_micro_batches * layout.micro_batch_size * layout.data
    tokens = samples * run.config.data.seq_length
    stages = stage_memory(run, layout, simulation)
    return Estimate(
        layout=layout,
        stages=tuple(stages),
        durations=durations,
        time=time,
        simulation=simulation,
        tokens_per_step=tokens,
        num_steps=run.config.training.train_iters,
        model_flops_per_second=training_flops(run.architecture, run.config.data.seq_length) * tokens / time.total,
        cluster=cluster,
        peak_flops=cluster.gpu.flops(bf16=run.config.training.bf16),
        building=build_memory(run, layout, stages, cluster),
    )


def search(run: PlannedRun, cluster: Cluster, *, num_results: int) -> list[Estimate]:
    """Return the fastest layouts that fit, best first: at most one per tensor size, pipeline size and ZeRO stage.

    Branch and bound: layouts are estimated in the order of a lower bound of their step time, until the bound exceeds
    the results found so far. The results are those of an exhaustive search.

    Raises:
        LayoutError: no layout is possible, or none fits.
    """
    bounds: list[tuple[float, int, Layout]] = []
    found = smallest = 0
    unbuildable: BuildMemory | None = None
    candidates = list(candidate_layouts(run, cluster.num_gpus, max_tensor=cluster.gpus_per_node))
    for layout in track(candidates, "memory of layouts", "layouts"):
        found += 1
        saved = OneForwardOneBackward(layout.pipeline, layout.num_micro_batches)
        stages = stage_memory(run, layout, saved)
        peak = max(stage.total for stage in stages)
        smallest = min(smallest or peak, peak)
        building = build_memory(run, layout, stages, cluster)
        if peak <= cluster.usable_bytes and not building.fits(cluster):
            if unbuildable is None or building.host < unbuildable.host:
                unbuildable = building
        elif peak <= cluster.usable_bytes:
            least = stage_durations(run, layout, cluster).least_step_seconds(layout.num_micro_batches)
            bounds.append((step_time(run, layout, cluster, schedule_seconds=least).total, found, layout))
    if not bounds and unbuildable is not None:
        unbuildable.check(cluster)
    if not bounds:
        raise _nothing_fits(run, cluster, found, smallest)
    best: dict[tuple[int, int, int], Estimate] = {}
    for bound, _, layout in track(sorted(bounds), "step time of layouts", "layouts"):
        ranked = sorted(best.values(), key=lambda e: e.time.total)[:num_results]
        if len(ranked) == num_results and bound > ranked[-1].time.total * (1 + EQUAL):
            break
        key = (layout.tensor, layout.pipeline, layout.zero_stage)
        if key in best and bound > best[key].time.total * (1 + EQUAL):
            continue
        planned = estimate(run, layout, cluster, max_computations=SEARCHED_COMPUTATIONS)
        if planned.fits and (key not in best or _is_better(planned, best[key])):
            best[key] = planned
    if not best:  # no room for what the schedules do ahead
        raise _nothing_fits(run, cluster, found, smallest)
    return sorted(best.values(), key=lambda e: e.time.total)[:num_results]


def _is_better(one: Estimate, other: Estimate) -> bool:
    """Return True if faster; or as fast, but without recomputation or with larger micro-batches (busier GPUs)."""
    if abs(one.time.total - other.time.total) > EQUAL * other.time.total:
        return one.time.total < other.time.total
    ours, theirs = one.layout, other.layout
    return (_work_again(theirs), ours.micro_batch_size) > (_work_again(ours), theirs.micro_batch_size)


def _work_again(layout: Layout) -> int:
    return GRANULARITIES.index(layout.recomputation.granularity)


def _nothing_fits(run: PlannedRun, cluster: Cluster, found: int, smallest: int) -> LayoutError:
    if found == 0:
        training, evaluated = run.config.training, run.config.logging.eval_global_batch_size
        schedule = training.step_batch_size_schedule
        named = "batch" if evaluated is None else f"batch, --eval-global-batch-size ({evaluated})"
        return LayoutError(
            "--global-batch-size" if schedule is None else SCHEDULE,
            training.global_batch_size if schedule is None else schedule,
            f"allow a layout on {cluster.num_gpus} GPUs that divides {named} and models evenly",
            "choose multiples of the number of GPUs, or another number of nodes",
        )
    return LayoutError(
        "--gpu",
        f"{cluster.usable_bytes / 2**30:.1f} GiB usable",
        f"hold one of {found} layouts on {cluster.num_gpus} GPUs (the smallest needs {smallest / 2**30:.1f} GiB)",
        "plan for more nodes, larger GPUs, or a smaller --micro-batch-size and --loss-head-stash-mib",
    )
