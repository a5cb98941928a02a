from __future__ import annotations

import itertools

import pytest

from megatron_slm.errors import LayoutError
from megatron_slm.parallel.topology import Topology

SIZES = [(p, d, 1, t) for p, d, t in itertools.product((1, 2, 3), (1, 2), (1, 2, 4))]


@pytest.mark.parametrize(("pipeline", "data", "context", "tensor"), [*SIZES, (2, 3, 2, 2), (1, 1, 4, 2)])
def test_ranks_are_numbered_as_deepspeed_does(pipeline: int, data: int, context: int, tensor: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    ours = Topology(pipeline=pipeline, data=data, context=context, tensor=tensor)
    stock = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data * context)
    for rank in range(ours.world_size):
        place, theirs = ours.coordinate(rank), stock.get_coord(rank)
        assert (place.pipeline, place.tensor) == (theirs.pipe, theirs.model)
        assert place.data * context + place.context == theirs.data
        assert ours.rank(**vars(place)) == rank
    assert ours.copies == data * context
    if tensor > 1:
        assert sorted(ours.tensor_groups()) == sorted(stock.get_axis_comm_lists("model"))
    if pipeline > 1:
        assert sorted(ours.pipeline_groups()) == sorted(stock.get_axis_comm_lists("pipe"))


def test_what_is_left_of_the_world_is_data_parallelism() -> None:
    assert Topology.from_world(12, tensor=2, pipeline=3) == Topology(pipeline=3, data=2, tensor=2)
    with pytest.raises(LayoutError, match="world size is 6: must be a multiple of"):
        Topology.from_world(6, tensor=4, pipeline=1)
    assert Topology.from_world(12, tensor=2, pipeline=1, context=3) == Topology(data=2, context=3, tensor=2)
    with pytest.raises(LayoutError, match=r"multiple of .*--context-parallel-size \(4\)"):
        Topology.from_world(6, tensor=1, pipeline=1, context=4)
    with pytest.raises(LayoutError, match="--tensor-model-parallel-size is 0: must be at least 1"):
        Topology(tensor=0)


def test_neighbors_are_all_pairs_of_adjacent_stages_in_two_disjoint_families() -> None:
    topology = Topology(pipeline=5, data=2, tensor=3)
    families = [topology.neighbors(first_stage) for first_stage in (0, 1)]
    for pairs in families:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    expected = [list(pair) for pipeline in topology.pipeline_groups() for pair in itertools.pairwise(pipeline)]
    assert sorted(families[0] + families[1]) == sorted(expected)


def test_ranks_that_share_a_head_are_neighbors() -> None:
    assert Topology(data=2, tensor=4).sharing_groups(2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_model_groups_hold_every_rank_once_and_one_data_index_each() -> None:
    topology = Topology(pipeline=2, data=3, tensor=2)
    model_groups = topology.model_groups()
    assert sorted(rank for ranks in model_groups for rank in ranks) == list(range(12))
    for data, ranks in enumerate(model_groups):
        assert {topology.coordinate(rank).data for rank in ranks} == {data}
        assert ranks == sorted(ranks)
