"""FLOP/s, MFU, and profiles of steps."""

from __future__ import annotations

import errno
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.config.architecture import Architecture
from megatron_slm.errors import EXIT_UNUSABLE, ConfigError, TrainingError
from megatron_slm.flags.load import parse
from megatron_slm.operations.watchdog import Watchdog
from megatron_slm.parallel.activity import LoopState
from megatron_slm.planning.gpus import GPUS, named_gpu
from megatron_slm.telemetry import utilization
from megatron_slm.telemetry.profiling import StepProfiler
from megatron_slm.telemetry.utilization import Utilization
from megatron_slm.training.health import Health
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, run_world

LLAMA_7B = Architecture(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32,
    kv_channels=128, vocab_size=32000,
)  # fmt: skip


def seven_b(monkeypatch: pytest.MonkeyPatch, device: str, **options: object) -> Utilization:
    monkeypatch.setattr(utilization, "device_name", lambda: device)
    values = {
        "references": [LLAMA_7B],
        "seq_length": 4096,
        "num_devices": 8,
        "bf16": True,
        "peak_tflops": None,
        **options,
    }
    return Utilization.of(LLAMA_7B, **values)  # type: ignore[arg-type]


def test_mfu_of_llama_7b(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 P + 6 L d s a token: six operations a parameter (without the embedding), and causal attention (PaLM, B)."""
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    by_hand = 6 * weights + 6 * 32 * 4096 * 4096
    found = seven_b(monkeypatch, "NVIDIA H100 80GB HBM3").metrics(8 * 9000.0)
    assert found["tflops_per_device"] == pytest.approx(by_hand * 9000 / 1e12, rel=1e-4)
    assert found["mfu"] == pytest.approx(by_hand * 9000 / 989e12, rel=1e-4)
    assert found["mfu_with_reference"] == pytest.approx(found["mfu"] * 4 / 3)


def test_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seven_b(monkeypatch, "cpu").metrics(1.0)["mfu"] is None
    assert seven_b(monkeypatch, "cpu", peak_tflops=2.0).peak_flops_per_device == 2e12
    assert seven_b(monkeypatch, "NVIDIA A100-SXM4-80GB", bf16=False).peak_flops_per_device == 19.5e12
    alone = seven_b(monkeypatch, "NVIDIA H200", references=[]).metrics(10.0)
    assert alone["mfu"] == alone["mfu_with_reference"]


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpus_by_their_drivers_names(driver: str, name: str | None) -> None:
    assert named_gpu(driver) is (GPUS[name] if name else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    return path


def test_a_profile_of_some_steps(folder: Path, tmp_path: Path) -> None:
    values = run_flags(
        folder / "corpus", tmp_path / "run", objective="slm", reference_load=folder / "reference", train_iters=5,
        pipeline_model_parallel_size=2, profile_step_start=2, profile_step_end=4, profile_ranks=[1], peak_tflops=0.001,
    )  # fmt: skip
    run_world(train_and_report, 2, values)
    files = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert files == {"rank-1-steps-2-3.json.gz", "rank-1-steps-2-3.txt"}
    events = json.loads(gzip.open(tmp_path / "run" / "profile" / "rank-1-steps-2-3.json.gz").read())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("slm::OptimizerStep") == 2, "two steps"
    assert names.count("slm::ForwardPass") == names.count("slm::BackwardPass") == 8, "of four micro-batches"
    assert names.count("slm::ReferenceForward") == 8
    assert "aten::mm" in (tmp_path / "run" / "profile" / "rank-1-steps-2-3.txt").read_text()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        assert values["mfu"] == pytest.approx(values["tflops_per_device"] * 1e3)


def test_a_run_that_ends_in_the_profile_writes_it(folder: Path, tmp_path: Path) -> None:
    values = run_flags(folder / "corpus", tmp_path / "run", train_iters=3, profile_step_start=3)
    run_world(train_and_report, 1, values)
    assert (tmp_path / "run" / "profile" / "rank-0-steps-3-3.json.gz").exists()


def test_a_run_that_is_resumed_in_the_profile_goes_on_with_it(folder: Path, tmp_path: Path) -> None:
    values = run_flags(
        folder / "corpus", tmp_path / "run", train_iters=4, profile_step_start=2, profile_step_end=5,
        save=tmp_path / "saved", save_interval=2, exit_interval=2,
    )  # fmt: skip
    run_world(train_and_report, 1, values)
    run_world(train_and_report, 1, {**values, "load": tmp_path / "saved"})
    profiles = sorted(path.name for path in (tmp_path / "run" / "profile").glob("*.gz"))
    assert profiles == ["rank-0-steps-2-2.json.gz", "rank-0-steps-3-4.json.gz"]


def train_without_room_for_a_profile(values: dict[str, Any]) -> int:
    """Half of the trace is written when the disk is full; the step that the run ends with."""

    def export(self: Any, path: str) -> None:
        Path(path).write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device", path)

    torch.profiler.profile.export_chrome_trace = export  # type: ignore[method-assign]
    return int(train_and_report(values)["step"])


def test_a_profile_that_cannot_be_written_ends_no_run(folder: Path, tmp_path: Path) -> None:
    values = run_flags(folder / "corpus", tmp_path / "run", train_iters=3, profile_step_start=2, profile_step_end=3)
    assert run_world(train_without_room_for_a_profile, 1, values) == [3]
    assert list((tmp_path / "run" / "profile").iterdir()) == []


def slow_profile(slow: int) -> list[str]:
    """Writing takes rank `slow` longer; the phases that this rank will write (or wait for) its profile in."""
    phases, real_enter, real_close = [], Watchdog.enter, StepProfiler.close

    def enter(self: Watchdog, state: LoopState, step: int) -> None:
        phases.append(state.name)
        real_enter(self, state, step)

    def close(self: StepProfiler) -> None:
        seen.append(phases[-1])
        if self._profile is not None and int(os.environ["RANK"]) == slow:
            time.sleep(4)
        real_close(self)

    seen: list[str] = []
    Watchdog.enter, StepProfiler.close = enter, close  # type: ignore[method-assign]
    return seen


def train_with_a_slow_profile(values: dict[str, Any], slow: int) -> list[str]:
    seen = slow_profile(slow)
    train_and_report(values)
    return seen


def fail_with_a_slow_profile(values: dict[str, Any], slow: int) -> None:
    slow_profile(slow)
    Health.must_stop = property(lambda self: self._run.state.step == 2)  # type: ignore[assignment, method-assign]
    Health.error = lambda self: TrainingError("loss", "nan", "be finite", "start again")  # type: ignore[method-assign]
    command(flags(values))


@pytest.mark.parametrize(("end", "phases"), [(3, ["PROFILE", "ENDING"]), (5, ["ENDING"])])
def test_nobody_takes_a_rank_that_writes_its_profile_for_one_that_hangs(
    end: int, phases: list[str], folder: Path, tmp_path: Path
) -> None:
    """Nor leaves without it, with rank 0 and the store that it keeps."""
    values = run_flags(
        folder / "corpus", tmp_path / "run", train_iters=3, profile_step_start=2, profile_step_end=end,
        profile_ranks=[1], pipeline_model_parallel_size=2,
    )  # fmt: skip
    assert run_world(train_with_a_slow_profile, 2, values, 1) == [phases] * 2
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 2


def test_nor_where_the_run_ends_with_an_error(folder: Path, tmp_path: Path) -> None:
    values = run_flags(
        folder / "corpus", tmp_path / "run", train_iters=3, profile_step_start=2, profile_ranks=[1],
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(fail_with_a_slow_profile, 2, values, 1, grace_seconds=30)
    assert failed.value.codes == [EXIT_UNUSABLE] * 2
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"profile_step_start": 4, "profile_step_end": 4}, "--profile-step-end is 4: must "),
        ({"profile_step_end": 4}, "--profile-step-end"),
        ({"profile_step_start": 0}, "--profile-step-start is 0"),
        ({"profile_ranks": [-1]}, "--profile-ranks"),
        ({"profile_ranks": []}, "--profile-ranks"),
        ({"peak_tflops": 0.0}, "--peak-tflops"),
    ],
)
def test_bad_windows(options: dict[str, object], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(flags(run_flags(tmp_path / "corpus", tmp_path / "run", **options)))


def test_a_rank_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    values = run_flags(folder / "corpus", tmp_path / "run", profile_step_start=1, profile_ranks=[0, 2])
    with pytest.raises(WorldError, match="--profile-ranks"):
        run_world(command, 2, flags(values))
