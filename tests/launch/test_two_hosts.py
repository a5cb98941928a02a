"""The launchers start the command over two hosts, and it trains as it does on one."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import BIN, SSH, Host, needs_hosts, two_hosts
from tests.support.runs import flags, recorded, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


class Cluster:
    """Two hosts, and runs on them."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host]) -> None:
        self.folder, self.hosts = folder, hosts
        self.corpus, self.reference = write_corpus(folder / "corpus"), save_hf_llama(folder / "reference")
        # the launcher passes on variables that begin with PYTHON or NCCL, and these
        (folder / "deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nMASTER_ADDR=10.77.0.1\n")
        self.environment = {**ENVIRONMENT, "DS_ENV_FILE": str(folder / "deepspeed_env")}

    def values(self, name: str, **changes: Any) -> dict[str, Any]:
        common = {"objective": "slm", "reference_load": self.reference, "pipeline_model_parallel_size": 2}
        return run_flags(self.corpus, self.folder / name, **{**common, **changes})

    def launch(
        self, *words: str, slots: int = 1, script: str = "tools/pretrain_slm.py", host: int = 0, log: str
    ) -> subprocess.Popen:
        """`deepspeed` on one host, with both in its hostfile."""
        hostfile = self.folder / f"hostfile{slots}"
        hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        own = words[: words.index("--")]
        command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), *own, script, *words[len(own) + 1 :]]
        return self.hosts[host].start(command, self.folder / log, self.environment)

    def finish(self, *launched: subprocess.Popen, logs: Sequence[str], timeout: float = 240.0) -> None:
        """Wait for the launchers; all well, and nothing left on either host."""
        deadline = time.monotonic() + timeout
        for process in launched:
            process.wait(max(1.0, deadline - time.monotonic()))
        output = "".join((self.folder / log).read_text(errors="replace") for log in logs)
        assert [process.returncode for process in launched] == [0] * len(launched), output
        assert [host.processes() for host in self.hosts] == [{}, {}], output

    def losses(self, name: str) -> list[dict[str, Any]]:
        return recorded(self.folder / name)

    def same_on_one_host(self, name: str, num_ranks: int, **changes: Any) -> None:
        """Every logged number but the times is that of the same ranks on one host, to the last bit."""
        run_world(train_and_report, num_ranks, self.values(f"{name}-alone", **changes))
        alone = self.losses(f"{name}-alone")
        assert len(alone) == 5
        assert self.losses(name) == alone


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with two_hosts(folder / "hosts") as hosts:
        yield Cluster(folder, hosts)


@pytest.fixture(scope="module")
def cluster_without_ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Each host has a folder of its own under `own`: nothing that is written there is shared."""
    folder = tmp_path_factory.mktemp("cluster")
    with two_hosts(folder / "hosts", ssh=False, private=[folder / "own"]) as hosts:
        yield Cluster(folder, hosts)


LAYOUTS = [
    pytest.param(1, {}, id="PP2"),
    pytest.param(2, {}, id="PP2xDP2", marks=pytest.mark.slow),
    pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="PP2xTP2", marks=pytest.mark.slow),
]


@needs_hosts(*SSH, "pdsh")
@pytest.mark.parametrize(("slots", "layout"), LAYOUTS)
def test_by_ssh(slots: int, layout: dict[str, Any], cluster: Cluster, request: pytest.FixtureRequest) -> None:
    name = f"ssh-{request.node.callspec.id}"
    log = f"{name}.log"
    launched = cluster.launch("--", *flags(cluster.values(name, **layout)), slots=slots, log=log)
    cluster.finish(launched, logs=[log])
    assert "node1: " in (cluster.folder / log).read_text()
    cluster.same_on_one_host(name, 2 * slots, **layout)


@needs_hosts()
def test_without_ssh(cluster_without_ssh: Cluster) -> None:
    """Each host has its own --node_rank, and builds the index if they share no folder for it."""
    cluster = cluster_without_ssh
    values = cluster.values("no-ssh", data_cache_path=cluster.folder / "own" / "cache")
    launched = [
        cluster.launch(
            "--no_ssh", "--node_rank", str(host), "--master_addr", "10.77.0.1", "--", *flags(values), host=host,
            log=f"no-ssh{host}.log",
        )
        for host in (0, 1)
    ]  # fmt: skip
    cluster.finish(*launched, logs=["no-ssh0.log", "no-ssh1.log"])
    cluster.same_on_one_host("no-ssh", 2)
    built = [host.run("ls", str(cluster.folder / "own" / "cache")).split() for host in cluster.hosts]
    assert built[0] == built[1]
    assert built[0]
    assert not list((cluster.folder / "own").iterdir()), "each host's folder is its own"


@needs_hosts(*SSH, "mpirun")
@pytest.mark.slow
def test_by_open_mpi(cluster: Cluster) -> None:
    """mpirun says rank and size in variables of its own; the address of rank 0 comes from .deepspeed_env."""
    arguments = "--allow-run-as-root --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0"
    launched = cluster.launch(
        "--launcher", "openmpi", "--launcher_args", arguments, "--", *flags(cluster.values("mpi")), log="mpi.log"
    )
    cluster.finish(launched, logs=["mpi.log"])
    cluster.same_on_one_host("mpi", 2)


def wait_until_gone(hosts: Sequence[Host], word: str, deadline: float) -> None:
    """Until no process with this word in its command line runs on any host."""
    while left := [line for host in hosts for line in host.processes().values() if word in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@needs_hosts(*SSH, "pdsh")
@pytest.mark.slow
def test_a_cable_pulled_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Both ends stop within the time-out and 10 s, each names the rank it waited for, and nothing stays behind."""
    minutes, written = 0.2, tmp_path / "cut" / "metrics.jsonl"
    with two_hosts(tmp_path / "hosts") as hosts:
        cluster = Cluster(tmp_path, hosts)
        values = cluster.values("cut", train_iters=100_000, distributed_timeout_minutes=minutes)
        launched = cluster.launch(
            "--enable_each_rank_log", str(tmp_path / "ranks"), "--", *flags(values), log="cut.log"
        )
        while not written.exists() or len(written.read_text().splitlines()) < 10:
            assert launched.poll() is None, (tmp_path / "cut.log").read_text()
            time.sleep(0.1)
        hosts[0].pull_cable()
        pulled = time.monotonic()
        wait_until_gone(hosts, "--local_rank=", pulled + 60 * minutes + 10)
        wait_until_gone(hosts, "", pulled + 60 * minutes + 30)  # the launchers, which look once a second
        assert launched.wait(30) != 0
        assert [host.processes() for host in hosts] == [{}, {}]
    for rank in (0, 1):
        (log,) = (tmp_path / "ranks").glob(f"*_rank{rank}.log")
        errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, log.read_text()
        assert f"rank {rank}: " in errors[0]
        assert f"no response from node{1 - rank} (rank {1 - rank})" in errors[0]
        assert "--distributed-timeout-minutes" in errors[0]


def preflight(cluster: Cluster, name: str, **changes: Any) -> tuple[int, dict[str, Any], str]:
    """The preflight on both hosts: exit code, report, and output."""
    written = cluster.folder / f"{name}.json"
    limits = {"preflight_link_seconds": 0.2, **changes}
    words = [*flags(cluster.values(name, **limits)), "--json", str(written)]
    launched = cluster.launch("--", *words, script="tools/preflight.py", slots=2, log=f"{name}.log")
    code = launched.wait(240)
    return code, json.loads(written.read_text()), (cluster.folder / f"{name}.log").read_text()


@needs_hosts(*SSH, "pdsh", "tc")
@pytest.mark.slow
def test_preflight_names_the_slow_direction(cluster: Cluster) -> None:
    shaper = [
        "tc",
        "qdisc",
        "add",
        "dev",
        "eth0",
        "root",
        "tbf",
        "rate",
        "200mbit",
        "burst",
        "128kbit",
        "latency",
        "50ms",
    ]
    try:
        cluster.hosts[1].run(*shaper)
    except AssertionError as error:
        pytest.skip(f"this kernel has no tbf: {error}")
    try:
        code, written, output = preflight(cluster, "slow", min_bandwidth_gbps=0.5)
    finally:
        cluster.hosts[1].run("tc", "qdisc", "del", "dev", "eth0", "root")
    found = {check["name"]: check for check in written["checks"]}
    assert code == 1, output
    for name in ("least bandwidth", "links between nodes"):
        (problem,) = found[name]["problems"]
        assert problem.startswith("node1 (rank 2) to node0 (rank 0): 0.")
    assert written["verdict"].startswith("NOT READY: least bandwidth")
    rates = {(link["source"], link["target"]): link["bytes_per_second"] * 8e-6 for link in written["measured"]["links"]}
    assert 100 < rates[2, 0] < 300, "Mbit/s, of 200"
    assert found["nodes and ranks"]["found"] == "4 ranks on 2 nodes: node0, node1"
    assert [node["host"] for node in written["facts"]] == ["node0", "node0", "node1", "node1"]


@needs_hosts()
@pytest.mark.slow
def test_preflight_without_a_shared_file_system(cluster_without_ssh: Cluster) -> None:
    """The corpus lies on one host only, checkpoints would too, and one host's own name leads nowhere else."""
    cluster, own = cluster_without_ssh, cluster_without_ssh.folder / "own"
    for end in (".bin", ".idx"):
        cluster.hosts[0].run("cp", f"{cluster.corpus}{end}", f"{own}/corpus{end}")
    values = cluster.values("alone", data_path=own / "corpus", save=own / "checkpoints", preflight_link_seconds=0.1)
    written = cluster.folder / "alone.json"

    def launch() -> list[int]:
        launched = [
            cluster.launch(
                "--no_ssh", "--node_rank", str(host), "--master_addr", "10.77.0.1", "--", *flags(values), "--json",
                str(written), script="tools/preflight.py", host=host, log=f"alone{host}.log",
            )
            for host in (0, 1)
        ]  # fmt: skip
        return [process.wait(240) for process in launched]

    assert launch() == [1, 1], (cluster.folder / "alone0.log").read_text()
    wrong = {c["name"]: c["problems"] for c in json.loads(written.read_text())["checks"] if c["status"] == "failed"}
    assert wrong == {
        "files": [
            f"node1: corpus {own}/corpus{end} is missing or unreadable (others have it)" for end in (".bin", ".idx")
        ],
        "shared checkpoint folder": ["node1: does not see files that node0 writes"],
    }

    loopback = cluster.folder / "hosts" / "hosts.loopback"
    loopback.write_text("127.0.0.1 localhost\n127.0.1.1 node1\n10.77.0.1 node0\n")  # as Debian's installer writes it
    cluster.hosts[1].run("mount", "--bind", str(loopback), "/etc/hosts")
    try:
        assert launch() == [1, 1]
    finally:
        cluster.hosts[1].run("umount", "/etc/hosts")
    wrong = {c["name"]: c["problems"] for c in json.loads(written.read_text())["checks"] if c["status"] == "failed"}
    assert wrong["connections"] == ["node0: cannot connect to node1: its address is 127.0.1.1, which only it can reach"]
