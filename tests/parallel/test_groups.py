from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.ops
import pytest
import torch
import torch.distributed as dist

from megatron_slm.errors import ConfigError
from megatron_slm.parallel import groups
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.meeting import raise_on_all_ranks
from tests.support.world import run_world


def alone() -> tuple[int, str, dict[str, object]]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    init_distributed()
    return dist.get_world_size(), dist.get_backend(), deepspeed.ops.__compatible_ops__


def test_without_a_launcher_it_is_a_world_of_one_and_nothing_is_compiled() -> None:
    assert run_world(alone, 1) == [(1, "gloo", {})]


def under_slurm() -> str:
    os.environ.pop("RANK")
    os.environ["SLURM_NTASKS"] = "4"
    try:
        init_distributed()
    except ConfigError as error:
        return str(error)
    return "no error"


def test_processes_of_a_scheduler_do_not_each_train_alone() -> None:
    assert "each process would train alone" in run_world(under_slurm, 1)[0]


def fail_on(rank: int) -> str:
    init_distributed()
    try:
        with raise_on_all_ranks():
            if dist.get_rank() == rank:
                raise ConfigError("--x", rank, "be right", "fix it")
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("rank", [0, 2])
def test_every_rank_raises_the_error_of_one(rank: int) -> None:
    assert run_world(fail_on, 3, rank) == [f"--x is {rank}: must be right. Fix: fix it"] * 3


def test_no_error_raises_nothing() -> None:
    assert run_world(fail_on, 2, 5) == ["no error"] * 2


@pytest.fixture
def default_group(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the world's process group, on rank 2 of 6."""
    group = SimpleNamespace(bound_device_id=None)
    monkeypatch.setattr(groups.dist.distributed_c10d, "_get_default_group", lambda: group)
    monkeypatch.setattr(groups.dist, "get_rank", lambda: 2)
    return group


def test_messages_between_stages_take_few_blocks_on_nccl(
    monkeypatch: pytest.MonkeyPatch, default_group: SimpleNamespace
) -> None:
    made: list[Any] = []
    options = SimpleNamespace(config=SimpleNamespace(max_ctas=32))
    monkeypatch.setattr(groups.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(groups.distributed_c10d, "default_pg_nccl_timeout", timedelta(minutes=7))
    monkeypatch.setattr(groups.dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: options), raising=False)
    monkeypatch.setattr(groups.dist, "new_group", lambda ranks, pg_options, **_: made.append((ranks, pg_options)))
    groups.create_message_group([[0, 1], [2, 4]])
    assert made == [([2, 4], options)]
    assert options.config.max_ctas == groups.MESSAGE_BLOCKS <= 4
    assert options._timeout == timedelta(minutes=7)
    monkeypatch.setattr(groups.dist, "get_backend", lambda: "gloo")
    groups.create_message_group([[2, 3]])
    assert made[1] == ([2, 3], None)


def sums_in_groups_of_neighbors() -> list[float]:
    init_distributed(timedelta(seconds=20))
    rank, sums = dist.get_rank(), []
    for family in ([[0, 1]], [[0, 1]], [[1, 2]], [[0, 1, 2]]):
        group = groups.create_group(family)
        if group is not None:
            x = torch.tensor(2.0**rank)
            dist.all_reduce(x, group=group)
            sums.append(x.item())
    return sums


def test_groups_overlap_though_some_ranks_are_in_more_of_them() -> None:
    """torch names a group by how many its creator has; members with different numbers would wait for each other."""
    assert run_world(sums_in_groups_of_neighbors, 3) == [[3, 3, 7], [3, 3, 6, 7], [6, 7]]


def sums_in_disjoint_groups(folder: str) -> list[float]:
    """First all groups are created at the same time, then those of ranks 0 and 1 before the others."""
    init_distributed(timedelta(seconds=20))
    done = Path(folder) / "done"
    rank, sums = dist.get_rank(), []
    for at_once in (True, True, True, False):
        while not at_once and rank > 1 and not done.exists():
            time.sleep(0.02)
        x = torch.tensor(2.0**rank)
        dist.all_reduce(x, group=groups.create_group([[0, 1], [2, 3]]))
        sums.append(x.item())
    done.touch()
    dist.barrier()  # rank 0 serves the store until all are done
    return sums


def test_a_group_is_created_by_its_members_alone(tmp_path: Path) -> None:
    found = run_world(sums_in_disjoint_groups, 4, str(tmp_path), timeout_seconds=60.0)
    assert found == [[3.0] * 4] * 2 + [[12.0] * 4] * 2


def test_a_group_bound_to_a_gpu_is_split_once_for_a_whole_family(
    monkeypatch: pytest.MonkeyPatch, default_group: SimpleNamespace
) -> None:
    calls: list[Any] = []
    default_group.bound_device_id = "cuda:0"
    monkeypatch.setattr(groups.dist, "new_group", lambda *_, **__: pytest.fail("would wait for all other ranks"))
    monkeypatch.setattr(groups.dist, "split_group", lambda **kwargs: calls.append(kwargs))
    groups.create_group([[0, 1], [3, 4]])
    assert calls == [{"split_ranks": [[0, 1], [3, 4]], "pg_options": None}]
