"""Deviations are reported by node; the majority's state is not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_slm.config.preflight import PreflightConfig
from megatron_slm.errors import ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.preflight.check import Check
from megatron_slm.preflight.checks import evaluate
from megatron_slm.preflight.facts import name_nodes, num_checkpoints, parse_gpus
from megatron_slm.preflight.report import verdict

GIB = 2**30


def rank(number: int, **changes: Any) -> dict[str, Any]:
    """One of two ranks on each node."""
    facts: dict[str, Any] = {
        "rank": number, "local_rank": number % 2, "node": f"node{number // 2}", "versions": {"torch": "2.13.0"},
        "environment": {}, "threads": 1, "cores": 4, "gpu": None,
        "limits": {"open files": 10_000, "locked memory": -1},
    }  # fmt: skip
    if number % 2 == 0:
        facts |= {
            "config": {"lr": "0.1"}, "files": {"corpus a.idx": "1", "corpus a.bin": "2", "--load runs": None}, "address": "10.0.0.1",
            "disk": {"folder": "/save", "free": 100 * GIB, "checkpoint": 10 * GIB, "more": 3}, "not_writable": {},
            "shm_mib": 1024.0, "gpus": [], "unreachable": {}, "sees_save": True,
        }  # fmt: skip
    return {**facts, **changes}


def world(changed: dict[int, dict[str, Any]] | None = None, *, num_ranks: int = 6) -> list[dict[str, Any]]:
    return [rank(number, **(changed or {}).get(number, {})) for number in range(num_ranks)]


def wrong(changed: dict[int, dict[str, Any]], **limits: Any) -> dict[str, Check]:
    return {c.name: c for c in evaluate(world(changed), None, PreflightConfig(**limits)) if c.status != "passed"}


def test_alike_nodes_pass() -> None:
    checks = evaluate(world(), None, PreflightConfig())
    assert {check.status for check in checks} == {"passed"}
    assert verdict(checks) == "ready"


DISK = {"folder": "/save", "checkpoint": 10 * GIB, "more": 3}
FAULTS = [
    ("versions", 0, {"versions": {"torch": "2.12.0"}}, "node0: torch 2.12.0 and 2.13.0 (others 2.13.0)"),
    ("versions", 1, {"versions": {}}, "node0: torch 2.13.0 and none (others 2.13.0)"),
    ("configuration", 4, {"config": {"lr": "0.2"}}, "node2: lr 0.2 (others 0.1)"),
    ("environment", 2, {"environment": {"NCCL_ALGO": "Ring"}}, "node1: NCCL_ALGO Ring and none (others none)"),
    ("nodes and ranks", 3, {"local_rank": 0}, "node1: LOCAL_RANKs [0, 0]"),
    ("files", 4, {"files": {"corpus a.idx": "1", "corpus a.bin": "3", "--load runs": None}},
     "node2: corpus a.bin differs from that of most nodes"),
    ("files", 0, {"files": {"corpus a.idx": None, "corpus a.bin": "2", "--load runs": None}},
     "node0: corpus a.idx is missing or unreadable (others have it)"),
    ("files", 2, {"files": {"corpus a.idx": "1", "corpus a.bin": "2", "--load runs": "9"}},
     "node1: --load runs exists (others do not have it)"),
    ("write permission", 2, {"not_writable": {"--save /save": "Permission denied"}},
     "node1: --save /save (Permission denied)"),
    ("room for checkpoints", 4, {"disk": {**DISK, "free": 29 * GIB}}, "node2: 29.0 GiB free in /save, 30.0 GiB needed"),
    ("shared checkpoint folder", 2, {"sees_save": False}, "node1: does not see files that node0 writes"),
    ("connections", 0, {"unreachable": {"node2": "timed out"}}, "node0: cannot connect to node2: timed out"),
    ("threads", 2, {"threads": 4}, "node1: 2 ranks x 4 threads on 4 cores"),
    ("limits", 3, {"limits": {"open files": 1024, "locked memory": -1}},
     "node1: 1024 open files, --min-open-files 4096"),
    ("limits", 0, {"gpu": [9, 9], "limits": {"open files": -1, "locked memory": 65536}},
     "node0: 64 KiB of locked memory; InfiniBand needs unlimited"),
    ("shared memory", 4, {"shm_mib": 64.0}, "node2: /dev/shm has 64 MiB, --min-shm-mib 512"),
    ("GPU memory", 3, {"gpu": [60 * GIB, 80 * GIB]}, "node1: GPU 1: 60.0 GiB of 80.0 GiB free"),
    ("GPU memory errors", 2, {"gpu": [9, 9], "gpus": [{"index": "5", "ecc": "3", "processes": ""}]},
     "node1: GPU 5: 3 uncorrected"),
    ("other GPU processes", 2, {"gpu": [9, 9], "gpus": [{"index": "5", "ecc": "[N/A]", "processes": "77 python"}]},
     "node1: GPU 5: 77 python"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "change", "problem"), FAULTS)
def test_a_difference_names_its_node(name: str, number: int, change: dict[str, Any], problem: str) -> None:
    found = wrong({number: change})
    warns = name in ("environment", "threads", "limits", "shared memory", "other GPU processes")
    if name == "threads":  # the other rank of the node has one thread
        found = wrong({number: change, number + 1: change})
        problem = "node1: 2 ranks x 4 threads on 4 cores"
    assert list(found) == [name]
    assert found[name].problems == (problem,)
    assert found[name].status == ("warning" if warns else "failed")
    assert found[name].fix
    strict = wrong({number: change, **({number + 1: change} if name == "threads" else {})}, preflight_strict=True)
    assert strict[name].status == "failed"


def test_nodes_of_other_sizes_are_a_warning() -> None:
    checks = {check.name: check for check in evaluate(world(num_ranks=5), None, PreflightConfig())}
    assert checks["nodes and ranks"].status == "warning"
    assert checks["nodes and ranks"].problems == ("node2: 1 ranks (others 2)",)
    assert {check.status for name, check in checks.items() if name != "nodes and ranks"} == {"passed"}


def test_a_corpus_that_no_node_has_fails_and_optional_files_do_not() -> None:
    files = {"corpus a.idx": None, "corpus a.bin": "2", "corpus a.meta.json": None, "corpus a_loss_mask.idx": None}
    found = wrong({number: {"files": files} for number in (0, 2, 4)})
    assert found["files"].problems == ("all nodes: corpus a.idx is missing",)


def test_nodes_of_one_host_name_are_told_apart() -> None:
    facts = [
        {"host": "box", "node_number": "0"},
        {"host": "box", "node_number": "1"},
        {"host": "a", "node_number": "2"},
    ]
    assert [rank["node"] for rank in name_nodes(facts)] == ["box#0", "box#1", "a"]


def test_what_nvidia_smi_says() -> None:
    gpus = "0, 81559, 4, 0, 00000000:1B:00.0\n1, 81559, 9000, 2, 00000000:43:00.0\n"
    processes = "00000000:43:00.0, 4242, /usr/bin/python, x\n00000000:43:00.0, 77, mine\n"
    assert parse_gpus(gpus, processes, own={"77"}) == [
        {"index": "0", "ecc": "0", "processes": ""},
        {"index": "1", "ecc": "2", "processes": "4242 /usr/bin/python x"},
    ]
    assert parse_gpus("", "") == []


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--save", "x"], 1),
        (["--save-interval", "30"], 4),
        (["--save-interval", "10", "--keep-last", "2"], 3),
        (["--save-interval", "10", "--keep-last", "2", "--save-retain-interval", "50"], 5),
        (["--save-interval", "60", "--keep-last", "5"], 2),
    ],
)
def test_how_many_checkpoints_lie_there_at_the_fullest_moment(flags: list[str], count: int) -> None:
    assert num_checkpoints(parse(["--train-iters", "100", *flags])[0]) == count


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [("min-bandwidth-gbps", "0", "must be positive"), ("slow-link-share", "1.5", r"must be in \[0, 1\]")],
)
def test_limits_that_make_no_sense(flag: str, value: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{flag} is .*{rule}"):
        parse(["--train-iters", "1", f"--{flag}", value])
