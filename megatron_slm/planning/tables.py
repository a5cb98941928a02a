"""Formats plans as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from megatron_slm.planning.estimates import Estimate
from megatron_slm.planning.gpus import Cluster
from megatron_slm.planning.memory import StageMemory

MAX_STAGES_SHOWN = 8

PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer (master weights, moments)",
    "activations": "activations in flight",
    "working": "working memory of one pass",
    "loss_head": "loss head",
    "reference": "weights of the reference",
    "window": "look-ahead window",
    "messages": "messages between stages",
    "buckets": "DeepSpeed's permanent buffers",
    "step_buckets": "DeepSpeed's buffers in the optimizer step",
    "host": "(in host memory: gradients, optimizer)",
}
"""Labels of the parts of `StageMemory`."""


def memory_table(planned: Estimate, gpu: str) -> Table:
    """Tabulate GiB on one rank of each stage, by part; a few stages of long pipelines."""
    layout, cluster = planned.layout, planned.cluster
    table = stage_memory_table(
        planned.stages,
        title=f"Memory per rank in GiB: {cluster.num_gpus} GPUs = {layout.topology.describe()}, "
        f"ZeRO-{layout.zero_stage}",
        caption=f"Usable: {cluster.usable_bytes / 2**30:.1f} GiB, {cluster.memory_share:.0%} of {gpu}; the rest is "
        "for CUDA, NCCL and fragmentation. Peak: the larger of passes and optimizer step.",
    )
    shown = _shown(planned.stages)
    verdicts = ("yes" if planned.stages[stage].total <= cluster.usable_bytes else "NO" for stage in shown)
    table.add_row("fits", *verdicts)
    building = planned.building
    table.add_section()
    table.add_row("host memory of a node while building", f"{building.host / 2**30:.1f}")
    if building.device:
        table.add_row("a GPU's memory while building", f"{building.device / 2**30:.2f}")
    return table


def stage_memory_table(stages: Sequence[StageMemory], *, title: str, caption: str) -> Table:
    """Tabulate the parts and their peak."""
    shown = _shown(stages)
    table = Table(title=title, caption=caption)
    table.add_column("part")
    for stage in shown:
        table.add_column(f"stage {stage}", justify="right")
    for name in StageMemory.part_names():
        sizes = [getattr(stages[stage], name) for stage in shown]
        if any(sizes):
            table.add_row(PARTS[name], *(f"{size / 2**30:.2f}" for size in sizes))
    table.add_section()
    table.add_row("peak", *(f"{stages[stage].total / 2**30:.2f}" for stage in shown))
    return table


def _shown(stages: Sequence[StageMemory]) -> list[int]:
    """Return all stages; or the first, the last and the fullest if there are too many."""
    if len(stages) <= MAX_STAGES_SHOWN:
        return list(range(len(stages)))
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total)
    return sorted({0, 1, 2, fullest, len(stages) - 2, len(stages) - 1})


def speed_table(planned: Estimate, gpu: str) -> Table:
    """Tabulate step time by part, tokens per second, and the duration of the run."""
    time, layout, simulation = planned.time, planned.layout, planned.simulation
    per_gpu = planned.tokens_per_second / planned.cluster.num_gpus
    idle = max(simulation.bubble_fraction(stage) for stage in range(layout.pipeline))
    exact = planned.durations.backward == planned.durations.exact_backward
    share = sum(planned.durations.backward) / sum(planned.durations.exact_backward)
    rows = {
        "micro-batch": f"{layout.micro_batch_size} samples, {layout.num_micro_batches} per step and data-parallel rank",
        "passes": f"{time.schedule:.3f} s ({simulation.schedule.mode}; {simulation.ratio:.3f} x CLM's; "
        f"stages idle up to {idle:.1%})",
        **({} if exact else {"backward passes": f"{share:.2f} of those on all rows (--backward-rows)"}),
        "messages between stages": f"{time.messages:.3f} s",
        "gradient reduction": f"{time.gradients:.3f} s",
        "optimizer, parameter gathering": f"{time.optimizer:.3f} s",
        "step": f"{time.total:.3f} s, {planned.tokens_per_step:,} tokens",
        "tokens per second": f"{planned.tokens_per_second:,.0f} ({per_gpu:,.0f} per GPU), MFU {planned.mfu:.1%}",
        "run": f"{planned.num_steps:,} steps, {planned.num_steps * planned.tokens_per_step / 1e9:,.2f} B tokens: "
        f"{planned.days:,.2f} days, {planned.gpu_hours:,.0f} GPU-hours",
    }
    table = Table(title="Step and run", show_header=False, caption=assumptions(planned.cluster, gpu))
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def search_table(found: Sequence[Estimate], gpu: str) -> Table:
    """Tabulate layouts, best first."""
    cluster = found[0].cluster
    table = Table(
        title=f"Fastest layouts that fit {cluster.num_gpus} x {gpu} (sp: sequence parallel)"
        + f", context parallel {found[0].layout.context}" * (found[0].layout.context > 1),
        caption=assumptions(cluster, gpu),
    )
    columns = "TP|PP|DP|ZeRO|batches|recompute|GiB|s/step|/CLM's|tokens/s|MFU|days|GPU-hours"
    for column in columns.split("|"):
        table.add_column(column, justify="right", no_wrap=True)
    for planned in found:
        layout = planned.layout
        table.add_row(
            f"{layout.tensor} + sp" if layout.sequence_parallel else str(layout.tensor),
            str(layout.pipeline),
            str(layout.data),
            str(layout.zero_stage),
            f"{layout.micro_batch_size} x {layout.num_micro_batches}",
            layout.recomputation.granularity or "-",
            f"{planned.peak_bytes / 2**30:.1f}",
            f"{planned.time.total:.3f}",
            f"{planned.simulation.ratio:.3f}",
            f"{planned.tokens_per_second:,.0f}",
            f"{planned.mfu:.1%}",
            f"{planned.days:.2f}",
            f"{planned.gpu_hours:,.0f}",
        )
    return table


def assumptions(cluster: Cluster, gpu: str) -> str:
    """Return the assumptions behind the figures, in one sentence."""
    computing = "a roofline of" if cluster.efficiency is None else f"{cluster.efficiency:.0%} of the peak of"
    link, network = cluster.gpu.link_bytes_per_second / 1e9, cluster.gpu.network_bits_per_second / 1e9
    return (
        f"Assumed, not measured: {computing} {gpu} in forward and backward passes, "
        f"{cluster.link_efficiency:.0%} of {link:.0f} GB/s between GPUs of a node and of {network:.0f} Gb/s per GPU "
        "between nodes (docs/planning.md)."
    )
