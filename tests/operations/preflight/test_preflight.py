"""The preflight on four ranks of two simulated nodes, with planted faults."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import preflight as command
from megatron_slm.cli.pretrain import main as train
from megatron_slm.errors import PeerError
from megatron_slm.operations.preflight import facts, links, rendezvous
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.world import WorldError, run_world

_Usage = namedtuple("_Usage", "total used free")


def on_a_node(folder: str, argv: list[str], faults: list[str], trains: bool = False) -> tuple[int, str]:
    """The command on a rank of node0 (0 and 1) or node1 (2 and 3); each node has a working folder of its own.

    Returns:
        exit code, and what was printed.
    """
    node, local = divmod(int(os.environ["RANK"]), 2)
    os.environ.update(LOCAL_RANK=str(local), CROSS_RANK=str(node))
    os.chdir(Path(folder) / f"node{node}")
    socket.gethostname = lambda: f"node{node}"
    facts.own_address = lambda: "127.0.0.1"  # type: ignore[assignment]
    rendezvous._LOOPBACK = ("127.1.",)  # type: ignore[assignment]
    if node == 1:
        for fault in faults:
            _PLANT[fault]()
        if "flags" in faults:
            argv[argv.index("--lr") + 1] = "0.5"
    code = (train if trains else command.main)(argv)
    sys.stdout.flush()
    return code, Path(f"/proc/self/fd/{sys.stdout.fileno()}").resolve().read_text()


def _version() -> None:
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: "9.9.9" if name == "numpy" else real(name)  # type: ignore[assignment]


def _full_disk() -> None:
    shutil.disk_usage = lambda path: _Usage(2**40, 2**40 - 4096, 4096)  # type: ignore[assignment]


def _clock() -> None:
    real = time.time_ns
    time.time_ns = lambda: real() + 5_000_000_000


def _slow_sends() -> None:
    real = links._send_block
    links._send_block = lambda target, size: (time.sleep(0.3), real(target, size) + 0.3)[1]  # type: ignore[assignment]


def _loopback() -> None:
    facts.own_address = lambda: "127.1.0.1"  # type: ignore[assignment]


_PLANT: dict[str, Any] = {
    "version": _version, "full disk": _full_disk, "clock": _clock, "slow sends": _slow_sends, "loopback": _loopback,
    "variable": lambda: os.environ.update(NCCL_ALGO="Ring"), "flags": lambda: None,
}  # fmt: skip


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """A folder with one of each node, in which corpora lie."""
    for node in ("node0", "node1"):
        (tmp_path / node).mkdir()
        write_corpus(tmp_path / node / "corpus")
    return tmp_path


def values(folder: Path, **changes: Any) -> list[str]:
    """Paths without a beginning are each node's own."""
    common = {"save": folder / "shared", "preflight_link_seconds": 0.05, "slow_link_share": 0.0}
    return flags(run_flags(Path("corpus"), folder / "run", **{**common, **changes}))


def checks(path: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(path.read_text())["checks"]}


def test_nodes_that_are_alike(nodes: Path) -> None:
    argv = [*values(nodes), "--json", str(nodes / "out.json")]
    found = run_world(on_a_node, 4, str(nodes), argv, [])
    assert [code for code, _ in found] == [0] * 4
    assert "Preflight: ready" in found[0][1]
    assert "Preflight" not in found[1][1]
    written = json.loads((nodes / "out.json").read_text())
    assert written["ready"]
    assert {check["status"] for check in written["checks"]} <= {"passed", "warning"}  # of this machine
    ends = {(link["source"], link["target"]) for link in written["measured"]["links"]}
    assert ends == {(0, 2), (2, 0), (0, 1), (1, 0), (2, 3), (3, 2)}
    assert all(link["bytes_per_second"] > 0 for link in written["measured"]["links"])
    assert not list(nodes.glob("**/.preflight-*"))


def test_every_difference_names_the_node(nodes: Path) -> None:
    write_corpus(nodes / "node1" / "corpus", seed=1)
    argv = [*values(nodes, save="save", slow_link_share=0.5), "--json", str(nodes / "out.json")]
    for node in ("node0", "node1"):
        (nodes / node / "save").mkdir()
    faults = ["version", "full disk", "clock", "slow sends", "variable", "flags"]
    found = run_world(on_a_node, 4, str(nodes), argv, faults)
    assert [code for code, _ in found] == [1] * 4
    wrong = {name: check for name, check in checks(nodes / "out.json").items() if check["problems"]}
    expected = {
        "versions": "numpy 9.9.9", "configuration": "lr 0.5", "environment": "NCCL_ALGO Ring",
        "files": "corpus corpus.bin differs from that of most nodes", "room for checkpoints": "4.0 KiB free",
        "shared checkpoint folder": "does not see files that node0 writes", "clocks": "",
        "links between nodes": "node1 (rank 2) to node0 (rank 0)",
    }  # fmt: skip
    for name, words in expected.items():
        if name == "clocks":  # of two clocks neither is the majority
            (seconds,) = re.findall(r"[+-](\d+\.\d+) s", wrong[name]["problems"][0])
            assert float(seconds) == pytest.approx(5, abs=0.5)
            continue
        assert any(problem.startswith("node1") and words in problem for problem in wrong[name]["problems"]), wrong[name]
        assert not any(problem.startswith("node0:") for problem in wrong[name]["problems"]), wrong[name]
    assert "NOT READY: versions, configuration, files, room for checkpoints" in found[0][1]
    assert "error:" not in found[0][1]


def test_a_node_that_nobody_can_reach(nodes: Path) -> None:
    argv = [*values(nodes), "--json", str(nodes / "out.json")]
    assert [code for code, _ in run_world(on_a_node, 4, str(nodes), argv, ["loopback"])] == [1] * 4
    problems = checks(nodes / "out.json")["connections"]["problems"]
    assert problems == ["node0: cannot connect to node1: its address is 127.1.0.1, which only it can reach"]
    assert json.loads((nodes / "out.json").read_text())["measured"] is None


@pytest.mark.parametrize("faults", [[], ["version"]])
def test_before_training(faults: list[str], nodes: Path) -> None:
    argv = [*values(nodes, save=None, train_iters=2), "--preflight"]
    found = run_world(on_a_node, 4, str(nodes), argv, faults, True)
    if faults:
        assert [code for code, _ in found] == [2] * 4
        assert all("error: preflight is 'NOT READY: versions'" in output for _, output in found)
        assert not (nodes / "run" / "metrics.jsonl").exists()
    else:
        assert [code for code, _ in found] == [0] * 4
        assert "Preflight: ready" in found[0][1]
        assert len((nodes / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def come_but_for(rank: int, argv: list[str]) -> int:
    """The command on all ranks but one."""
    if int(os.environ["RANK"]) == rank:
        time.sleep(8)
        return 0
    raise SystemExit(command.main(argv))


def test_a_rank_that_does_not_come_is_named(nodes: Path) -> None:
    argv = values(nodes, distributed_timeout_minutes=0.05)
    with pytest.raises(WorldError) as failed:
        run_world(come_but_for, 3, 1, argv, grace_seconds=25)
    assert failed.value.codes[0] == failed.value.codes[2] == 1
    for rank in (0, 2):
        assert "error: preflight report of rank 1 is missing: must arrive within 3 s" in failed.value.outputs[rank]


def look_for_rank_0_elsewhere() -> str:
    if os.environ["RANK"] == "0":
        return ""
    os.environ["MASTER_PORT"] = "1"
    try:
        rendezvous.Rendezvous(rendezvous.timedelta(seconds=2))
    except PeerError as error:
        return str(error)
    return "met"


def test_an_address_of_rank_0_that_leads_nowhere() -> None:
    assert (
        "MASTER_ADDR:MASTER_PORT is '127.0.0.1:1': must be an address of rank 0 that rank 1 "
        in run_world(look_for_rank_0_elsewhere, 2)[1]
    )


def test_a_report_that_cannot_be_written_ends_every_rank(nodes: Path) -> None:
    argv = [*values(nodes), "--json", str(nodes / "nowhere" / "out.json")]
    found = run_world(on_a_node, 4, str(nodes), argv, [])
    assert [code for code, _ in found] == [1] * 4
    assert "error: --json is " in found[0][1]
