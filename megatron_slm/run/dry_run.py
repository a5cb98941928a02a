"""What a run would be, as tables: layout, batch arithmetic, tokens, backends."""

from __future__ import annotations

from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import planned_share
from megatron_slm.config.run import RunConfig
from megatron_slm.engine.schedule.simulate import Simulation
from megatron_slm.model.block import Block
from megatron_slm.model.llama import Embedding, Head, layer_list
from megatron_slm.model.partition import stage_bounds
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.parallel.topology import Topology
from megatron_slm.run.plan import Plan
from megatron_slm.run.sample_order import describe_sources, document_treatment
from megatron_slm.run.schedule import plan_schedule
from megatron_slm.selection.selector import Selector


def stage_parameters(arch: Architecture, config: RunConfig, topology: Topology) -> list[tuple[str, int]]:
    """For each stage, its layers in words and the parameters one tensor-parallel rank holds of them.

    The layers are made on the meta device, so the numbers are those of the real modules.
    """
    tp = TensorParallel(size=topology.tensor)
    layers = ParallelLayers(tp, vocabulary_divisible_by=config.model.make_vocab_size_divisible_by)
    bounds = stage_bounds(arch.num_layers, topology.pipeline)
    makers = layer_list(arch, layers)
    rows = []
    for begin, end in pairwise(bounds):
        with torch.device("meta"):
            modules = [maker.make() for maker in makers[begin:end]]
        kinds = [maker.kind for maker in makers[begin:end]]
        blocks = kinds.count(Block)
        words = [f"{blocks} block{'s' * (blocks != 1)}"] * (blocks > 0)
        words = ["embedding"] * (Embedding in kinds) + words + ["head"] * (Head in kinds)
        count = sum(p.numel() for module in modules for p in module.parameters())
        rows.append((", ".join(words) or "nothing", count))
    return rows


def print_dry_run(plan: Plan) -> None:
    """Print the tables."""
    console = Console()
    reference = plan.reference.architecture if plan.reference else None
    console.print(layout_table(plan.config, plan.topology, plan.zero_stage, plan.architecture, reference))
    console.print(_batch_table(plan))
    table = Table(title="Backends", show_header=False)
    for what, by in plan.describe_backends().items():
        table.add_row(what, by)
    if plan.reference is not None:
        schedule = plan_schedule(plan)
        beside = f"predicted step {Simulation(schedule).ratio:.2f} x plain training's"
        table.add_row("reference schedule", f"{schedule.mode}, {beside} (costs counted)")
    console.print(table)
    console.print("The configuration is sound; nothing was trained.")


def layout_table(
    config: RunConfig, topology: Topology, zero_stage: int, arch: Architecture, reference: Architecture | None
) -> Table:
    """What each stage holds, and how many parameters of it a rank."""
    title = (
        f"Layout: {topology.world_size} ranks = {topology.pipeline} stages x {topology.data} data parallel x "
        f"{topology.tensor} tensor parallel, ZeRO-{zero_stage}"
    )
    table = Table(title=title)
    table.add_column("stage")
    table.add_column("model")
    table.add_column("parameters a rank", justify="right")
    table.add_column("reference")
    table.add_column("parameters a rank", justify="right")
    model = stage_parameters(arch, config, topology)
    frozen = stage_parameters(reference, config, topology) if reference else [("-", 0)] * len(model)
    for stage, (ours, theirs) in enumerate(zip(model, frozen, strict=True)):
        table.add_row(str(stage), ours[0], f"{ours[1]:,}", theirs[0], f"{theirs[1]:,}")
    table.caption = f"{arch.num_parameters:,} parameters in all, vocabulary {arch.vocab_size:,}"
    return table


def batch_rows(
    config: RunConfig, topology: Topology, selector: Selector, global_batch_size: int, *, first_step: int = 0
) -> dict[str, str]:
    """Batch arithmetic and tokens of the run, in words."""
    tokens_per_step = global_batch_size * config.data.seq_length
    num_micro_batches = global_batch_size // (config.training.micro_batch_size * topology.data)
    return {
        "objective": f"{config.selection.objective}, {selector.describe()}",
        "backward": _backward_in_words(config, selector),
        "precision": "bf16, fp32 accumulation" if config.training.bf16 else "fp32",
        "global batch": f"{global_batch_size} samples = {config.training.micro_batch_size} a micro-batch x "
        f"{num_micro_batches} micro-batches x {topology.data} data parallel",
        "tokens a step": f"{tokens_per_step:,}",
        "steps": f"{config.training.train_iters:,}" + (f" from {first_step:,}" if first_step else ""),
        "tokens of the run": f"{tokens_per_step * config.training.train_iters:,}",
    }


def _backward_in_words(config: RunConfig, selector: Selector) -> str:
    rows = config.backward
    if rows.is_exact:
        return "all rows of the gradient"
    share = planned_share(rows, selector.expected_share(config.training.train_iters))
    by = "" if rows.backward_row_variance is None else f", by a variance of {rows.backward_row_variance:g}"
    return f"{rows.backward_rows} rows of the gradient, about {share:.2f} of all{by}"


def _batch_table(plan: Plan) -> Table:
    config, samples = plan.config, plan.train_samples
    first_step = plan.resume.manifest.step if plan.resume else 0
    rows = batch_rows(config, plan.topology, plan.selector, plan.global_batch_size, first_step=first_step)
    for line in describe_sources(samples):
        name, _, text = line.partition(": ")
        rows[name] = text
    rows["documents"] = document_treatment(config.data)
    for reader in plan.scores.readers if plan.scores else ():
        stored = reader.manifest
        rows[f"scores {reader.folder}"] = (
            f"{stored.data.num_samples:,} samples in {stored.dtype}, of the reference {stored.reference}"
        )
    for name, held_out in (*plan.held_out.items(), *plan.test.items()):
        rows[f"held-out {name}"] = f"{held_out.num_tokens:,} tokens"
    return rows_table("Batches and tokens", rows)


def rows_table(title: str, rows: dict[str, str]) -> Table:
    """Names and texts as a table."""
    table = Table(title=title, show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    return table
