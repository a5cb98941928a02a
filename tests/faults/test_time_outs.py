"""The configured timeout applies to every group and to every wait on a channel."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_slm.errors import PeerError
from megatron_slm.flags.load import parse
from megatron_slm.parallel.activity import Activity
from megatron_slm.parallel.channels import Channels, Lane
from megatron_slm.parallel.groups import init_distributed
from megatron_slm.parallel.topology import Topology
from megatron_slm.training.pretrain import pretrain
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.world import run_world


def time_outs(values: dict[str, Any]) -> list[float]:
    """Seconds, of each group that this rank has a part in after a run."""
    config, _ = parse(flags(values))
    pretrain(config)
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in distributed_c10d._world.pg_map]


@pytest.mark.parametrize("layout", ["stages", "zero 3"])
def test_every_group_has_the_configured_time_out(layout: str, tmp_path: Path) -> None:
    """Whoever makes it: this package, or DeepSpeed, which passes none."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    changes: dict[str, Any] = {"deepspeed_config": zero_config(3), "tensor_model_parallel_size": 2}
    if layout == "stages":
        changes = {"pipeline_model_parallel_size": 2, "slm_scope": "data-parallel"}
    values = run_flags(
        corpus, tmp_path / "run", objective="slm", reference_load=reference, train_iters=1,
        distributed_timeout_minutes=1.75, **changes,
    )  # fmt: skip
    for found in run_world(time_outs, 4, values):
        assert len(found) > 3
        assert set(found) == {105.0}


def unanswered(doing: str) -> tuple[str, float]:
    """What a rank says, and after how long, that waits for one that does nothing."""
    init_distributed(timedelta(seconds=2))
    rank, activity = dist.get_rank(), Activity()
    channels = Channels(Topology(pipeline=2), rank, torch.device("cpu"), [Lane.FORWARD], activity)
    dist.barrier()
    started = time.monotonic()
    if rank == 1:
        time.sleep(5)
        return "", 0.0
    channel = channels.next[Lane.FORWARD]

    def wait() -> None:
        if doing == "receiving":
            channel.post_receive((4,), torch.float32, torch.device("cpu"))
            channel.receive()
        for _ in range(1 if doing == "flushing" else 8):
            channel.send(torch.zeros(16 * 2**20))
        channel.flush()

    with pytest.raises(PeerError) as raised:
        wait()
    assert activity.waiting_for is None
    return str(raised.value), time.monotonic() - started


@pytest.mark.parametrize("doing", ["receiving", "sending", "flushing"])
def test_no_wait_on_a_channel_outlasts_it(doing: str) -> None:
    text, seconds = run_world(unanswered, 2, doing)[0]
    verb = "receiving from" if doing == "receiving" else "sending to"
    assert f"{verb} rank 1, forward lane" in text
    assert "Timed out" in text
    assert 1.5 < seconds < 2 + 10
