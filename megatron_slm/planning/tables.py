"""Plans as tables."""

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
    "working": "one pass's working memory",
    "loss_head": "loss head",
    "reference": "reference's weights",
    "window": "look-ahead window",
    "messages": "messages between stages",
    "buckets": "DeepSpeed's buffers, all the time",
    "step_buckets": "DeepSpeed's buffers, at the step alone",
    "host": "(in the host's memory: gradients, optimizer)",
}
"""How the parts of `StageMemory` are called."""


def memory_table(planned: Estimate, gpu: str) -> Table:
    """GiB on one rank of each stage, part by part; of long pipelines a few stages."""
    layout, cluster = planned.layout, planned.cluster
    table = stage_memory_table(
        planned.stages,
        title=f"Memory a rank in GiB: {cluster.num_gpus} GPUs = {layout.pipeline} stages x {layout.data} data parallel "
        f"x {layout.tensor} tensor parallel, ZeRO-{layout.zero_stage}",
        caption=f"Usable: {cluster.usable_bytes / 2**30:.1f} GiB, {cluster.memory_share:.0%} of {gpu}; the rest is "
        "for CUDA, NCCL and fragments. Peak: the greater of passes and step, which do not coincide.",
    )
    shown = _shown(planned.stages)
    verdicts = ("yes" if planned.stages[stage].total <= cluster.usable_bytes else "NO" for stage in shown)
    table.add_row("fits", *verdicts)
    return table


def stage_memory_table(stages: Sequence[StageMemory], *, title: str, caption: str) -> Table:
    """The parts and their peak, whatever the GPU."""
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
    """All stages, or of many the first ones, the fullest and the last ones."""
    if len(stages) <= MAX_STAGES_SHOWN:
        return list(range(len(stages)))
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total)
    return sorted({0, 1, 2, fullest, len(stages) - 2, len(stages) - 1})


def speed_table(planned: Estimate, gpu: str) -> Table:
    """Step time by part, tokens a second, and the length of the run."""
    time, layout, simulation = planned.time, planned.layout, planned.simulation
    a_gpu = planned.tokens_per_second / planned.cluster.num_gpus
    idle = max(simulation.bubble_fraction(stage) for stage in range(layout.pipeline))
    exact = planned.durations.backward == planned.durations.exact_backward
    share = sum(planned.durations.backward) / sum(planned.durations.exact_backward)
    rows = {
        "micro-batch": f"{layout.micro_batch_size} samples, {layout.num_micro_batches} of them a step and rank",
        "passes": f"{time.schedule:.3f} s ({simulation.schedule.mode}; {simulation.ratio:.3f} x CLM's; "
        f"a stage idle for up to {idle:.1%})",
        **({} if exact else {"backward passes": f"{share:.2f} of those on all rows (--backward-rows)"}),
        "messages between stages": f"{time.messages:.3f} s",
        "gradient reduction": f"{time.gradients:.3f} s",
        "optimizer, parameters gathered": f"{time.optimizer:.3f} s",
        "step": f"{time.total:.3f} s, {planned.tokens_per_step:,} tokens",
        "tokens a second": f"{planned.tokens_per_second:,.0f} ({a_gpu:,.0f} a GPU), MFU {planned.mfu:.1%}",
        "the run": f"{planned.num_steps:,} steps, {planned.num_steps * planned.tokens_per_step / 1e9:,.2f} B tokens: "
        f"{planned.days:,.2f} days, {planned.gpu_hours:,.0f} GPU-hours",
    }
    table = Table(title="Step and run", show_header=False, caption=assumptions(planned.cluster, gpu))
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def search_table(found: Sequence[Estimate], gpu: str) -> Table:
    """The layouts, best first."""
    cluster = found[0].cluster
    table = Table(
        title=f"Fastest layouts that fit {cluster.num_gpus} x {gpu} (sp: sequence parallel)",
        caption=assumptions(cluster, gpu),
    )
    columns = "TP|PP|DP|ZeRO|batches|recompute|GiB|s/step|/CLM's|tokens/s|MFU|days|GPU-hours"
    for column in columns.split("|"):
        table.add_column(column, justify="right", no_wrap=True)
    for planned in found:
        layout = planned.layout
        table.add_row(
            f"{layout.tensor}{' + sp' * layout.sequence_parallel}",
            str(layout.pipeline),
            str(layout.data),
            str(layout.zero_stage),
            f"{layout.micro_batch_size} x {layout.num_micro_batches}",
            "full" if layout.recomputes else "-",
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
    """What the figures rest on, in a line."""
    link, network = cluster.gpu.link_bytes_per_second / 1e9, cluster.gpu.network_bits_per_second / 1e9
    return (
        f"Assumed, not measured: {cluster.efficiency:.0%} of {gpu}'s peak in forward and backward passes, "
        f"{cluster.link_efficiency:.0%} of {link:.0f} GB/s between the GPUs of a node and of {network:.0f} Gb/s a GPU "
        "between nodes (docs/planning.md)."
    )
