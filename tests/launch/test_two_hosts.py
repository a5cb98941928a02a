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
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
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
        said = "".join((self.folder / log).read_text(errors="replace") for log in logs)
        for process in launched:
            process.wait(max(1.0, deadline - time.monotonic()))
        said = "".join((self.folder / log).read_text(errors="replace") for log in logs)
        assert [process.returncode for process in launched] == [0] * len(launched), said
        assert [host.processes() for host in self.hosts] == [{}, {}], said

    def losses(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines]

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
    pytest.param(
        2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="PP2xTP2", marks=pytest.mark.slow
    ),
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
    """Each host is told which it is; the index is built by each, where they share no folder for it."""
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
