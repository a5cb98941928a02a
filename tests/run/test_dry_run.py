"""The tables of a dry run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_slm.config.architecture import Architecture
from megatron_slm.config.run import RunConfig
from megatron_slm.flags.load import parse
from megatron_slm.parallel.topology import Topology
from megatron_slm.run.dry_run import layout_table
from tests.support.runs import flags, run_flags
from tests.support.world import run_world

SHAPE: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 4, "vocab_size": 96,
}  # fmt: skip


def held_on_this_rank(arch: Architecture, frozen: Architecture, topology: Topology, divisible: int) -> tuple[int, int]:
    """Parameters of the stages of model and reference that training would build here."""
    from megatron_slm.engine.grid import Grid
    from megatron_slm.engine.module import StageModule
    from megatron_slm.parallel.groups import DataParallel, create_tensor_parallel_group, init_distributed
    from megatron_slm.parallel.layers import ParallelLayers
    from megatron_slm.reference.frozen import FrozenStage

    init_distributed()
    tp = create_tensor_parallel_group(topology, sequence_parallel=False)
    layers = ParallelLayers(tp, vocabulary_divisible_by=divisible)
    model = StageModule(arch, layers, Grid(topology, tp, DataParallel()))
    stage = topology.coordinate(torch.distributed.get_rank()).pipeline
    reference = FrozenStage(frozen, layers, stage=stage, num_stages=topology.pipeline)
    counts = [sum(p.numel() for p in module.parameters()) for module in (model, reference)]
    torch.distributed.barrier()  # no rank leaves while another still connects to it
    return counts[0], counts[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 1, 2), (1, 1, 2)])
def test_parameters_are_those_that_each_stage_builds(layout: tuple[int, int, int], tied: bool, tmp_path: Any) -> None:
    topology = Topology(pipeline=layout[0], data=layout[1], tensor=layout[2])
    arch = Architecture(**SHAPE, tied=tied)
    frozen = Architecture(**{**SHAPE, "num_layers": 2}, tied=not tied)
    config: RunConfig = parse(flags(run_flags(tmp_path / "corpus", tmp_path / "run")))[0]
    built = run_world(
        held_on_this_rank, topology.world_size, arch, frozen, topology, config.model.make_vocab_size_divisible_by
    )
    table = layout_table(config, topology, 1, arch, [frozen])
    model, reference = ([int(text.replace(",", "")) for text in table.columns[at].cells] for at in (2, 4))
    stages = [topology.coordinate(rank).pipeline for rank in range(topology.world_size)]
    assert [(model[stage], reference[stage]) for stage in stages] == built


def test_layers_are_named(tmp_path: Any) -> None:
    config = parse(flags(run_flags(tmp_path / "corpus", tmp_path / "run")))[0]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(
            layout_table(
                config,
                Topology(pipeline=4, data=1, tensor=1),
                1,
                Architecture(**SHAPE),
                [Architecture(**{**SHAPE, "num_layers": 2})],
            )
        )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.get().splitlines() if "│" in line]
    assert [(row[1], row[3]) for row in rows] == [
        ("embedding, 1 block", "embedding, 1 block"),
        ("1 block", "1 block"),
        ("1 block", "nothing"),
        ("1 block, head", "head"),
    ]
