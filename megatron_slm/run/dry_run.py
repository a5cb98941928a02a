"""Prints the plan of a run as tables: layout, batch arithmetic, tokens, backends."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.backward import planned_share
from megatron_slm.config.run import RunConfig
from megatron_slm.engine.schedule.simulate import Simulation
from megatron_slm.parallel.batches import samples_together
from megatron_slm.parallel.topology import Topology
from megatron_slm.planning.parameters import StageParameters, stage_parameters
from megatron_slm.run.plan import Plan
from megatron_slm.run.sample_order import describe_sources, document_treatment
from megatron_slm.run.schedule import plan_schedule
from megatron_slm.selection.selector import Selector


def print_dry_run(plan: Plan) -> None:
    """Print a plan."""
    console = Console()
    references = plan.models.references
    console.print(layout_table(plan.config, plan.topology, plan.zero_stage, plan.models.architecture, references))
    console.print(_batch_table(plan))
    table = Table(title="Backends", show_header=False)
    for part, backend in plan.describe_backends().items():
        table.add_row(part, backend)
    if plan.models.reference is not None:
        schedule = plan_schedule(plan)
        beside = f"predicted step {Simulation(schedule).ratio:.2f} x plain training's"
        table.add_row("reference schedule", f"{schedule.mode}, {beside} (costs counted)")
    console.print(table)
    console.print("The configuration is sound; nothing was trained.")


def layout_table(
    config: RunConfig, topology: Topology, zero_stage: int, arch: Architecture, references: Sequence[Architecture]
) -> Table:
    """Tabulate each stage's layers and the parameters of one of its ranks."""
    title = f"Layout: {topology.world_size} ranks = {topology.describe()}, ZeRO-{zero_stage}"
    table = Table(title=title)
    table.add_column("stage")
    table.add_column("model")
    table.add_column("parameters a rank", justify="right")
    for what in ("reference", "base")[: max(1, len(references))]:
        table.add_column(what)
        table.add_column("parameters a rank", justify="right")
    models = [_stages(one, config, topology) for one in (arch, *(references or (None,)))]
    for stage, held in enumerate(zip(*models, strict=True)):
        table.add_row(str(stage), *(cell for of_model in held for cell in _stage_cells(of_model)))
    table.caption = f"{arch.num_parameters:,} parameters in all, vocabulary {arch.vocab_size:,}"
    return table


def _stages(arch: Architecture | None, config: RunConfig, topology: Topology) -> Sequence[StageParameters | None]:
    if arch is None:
        return [None] * topology.pipeline
    divisible = config.model.make_vocab_size_divisible_by
    return stage_parameters(
        arch, tensor=topology.tensor, num_stages=topology.pipeline, vocabulary_divisible_by=divisible
    )


def _stage_cells(stage: StageParameters | None) -> tuple[str, str]:
    """Layers of a stage in words, and the parameters that one tensor-parallel rank holds of them."""
    if stage is None:
        return "-", "0"
    layers = ["embedding"] if stage.has_embedding else []
    if stage.num_blocks:
        layers.append("1 block" if stage.num_blocks == 1 else f"{stage.num_blocks} blocks")
    if stage.has_head:
        layers.append("head")
    return ", ".join(layers) or "nothing", f"{stage.total:,}"


def batch_rows(config: RunConfig, topology: Topology, selector: Selector, *, first_step: int = 0) -> dict[str, str]:
    """Describe batch arithmetic and tokens of a run."""
    together, length = samples_together(config, topology), config.data.seq_length
    sizes = config.batch_sizes(default=together)
    extremes = sorted({min(sizes.sizes), sizes.largest})
    micro_batches = " to ".join(str(size // together) for size in extremes)
    tokens = " to ".join(f"{size * length:,}" for size in extremes)
    return {
        "objective": f"{config.selection.objective}, {selector.describe()}",
        "backward": _backward_in_words(config, selector),
        "precision": "bf16, fp32 accumulation" if config.training.bf16 else "fp32",
        "global batch": f"{sizes.describe(length)} samples = {config.training.micro_batch_size} a micro-batch x "
        f"{micro_batches} micro-batches x {topology.data} data parallel",
        "tokens a step": tokens,
        "steps": f"{config.training.train_iters:,}" + (f" from {first_step:,}" if first_step else ""),
        "tokens of the run": f"{sizes.samples_of(config.training.train_iters) * length:,}",
    }


def _backward_in_words(config: RunConfig, selector: Selector) -> str:
    rows = config.backward
    if rows.is_exact:
        return "all rows of the gradient"
    share = planned_share(rows, selector.expected_share(config.training.train_iters))
    by = "" if rows.backward_row_variance is None else f", by a variance of {rows.backward_row_variance:g}"
    return f"{rows.backward_rows} rows of the gradient, about {share:.2f} of all{by}"


def _batch_table(plan: Plan) -> Table:
    config, samples = plan.config, plan.data.train
    first_step = plan.resume.manifest.step if plan.resume else 0
    rows = batch_rows(config, plan.topology, plan.selector, first_step=first_step)
    for line in describe_sources(samples):
        name, _, text = line.partition(": ")
        rows[name] = text
    rows["documents"] = document_treatment(config)
    for reader in plan.scores.readers if plan.scores else ():
        stored = reader.manifest
        rows[f"scores {reader.folder}"] = (
            f"{stored.data.num_samples:,} samples in {stored.dtype}, of the reference {stored.reference}"
        )
    for name, held_out in (*plan.data.valid.items(), *plan.data.test.items()):
        rows[f"held-out {name}"] = f"{held_out.num_tokens:,} tokens"
    return rows_table("Batches and tokens", rows)


def rows_table(title: str, rows: dict[str, str]) -> Table:
    """Tabulate texts by name."""
    table = Table(title=title, show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    return table
