"""Collects the facts of one rank and its node, as JSON-compatible values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import megatron_slm
from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.format import complete_checkpoints
from megatron_slm.config.run import RunConfig
from megatron_slm.device import cuda_versions, device_memory, on_gpu
from megatron_slm.errors import SlmError
from megatron_slm.flags.load import to_flat_dict
from megatron_slm.operations.reach import own_address
from megatron_slm.planning.planned_run import plan_run
from megatron_slm.preflight.files import fingerprints, source_fingerprint
from megatron_slm.run.corpora import cache_folder

Facts = dict[str, Any]

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors", "triton", "flash-attn", "apex")
COMMUNICATION = ("NCCL_", "GLOO_", "UCX_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")
"""Prefixes of environment variables that affect communication."""
_BYTES_PER_PARAMETER = 12
"""Size of a checkpoint: fp32 weights and two moments."""


def gather_facts(config: RunConfig) -> Facts:
    """Return this rank's facts; the first rank of a node adds those of the node."""
    facts: Facts = {
        "rank": int(os.environ["RANK"]),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "host": socket.gethostname(),
        "node_number": node_number(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(COMMUNICATION)},
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": device_memory(),
        "limits": {
            "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "locked memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        },
    }
    if is_first_of_node():
        shm = Path("/dev/shm")
        facts |= {
            "config": {name: repr(value) for name, value in to_flat_dict(config).items()},
            "files": fingerprints(config),
            "address": own_address(),
            "disk": disk(config),
            "not_writable": not_writable(config),
            "shm_mib": shutil.disk_usage(shm).total / 2**20 if shm.is_dir() else 0,
            "gpus": gpu_states(),
        }
    return facts


def is_first_of_node() -> bool:
    """Return True for the rank that represents its node."""
    return os.environ["LOCAL_RANK"] == "0"


def node_number() -> str:
    """Return the node's number from the launcher (deepspeed, torchrun, srun), or an empty string."""
    return os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", "")))


def name_nodes(facts: Sequence[Facts]) -> list[Facts]:
    """Add the `node` of each rank: its host name, followed by #NUMBER if several nodes have that name."""
    numbers: dict[str, set[str]] = {}
    for rank in facts:
        numbers.setdefault(rank["host"], set()).add(rank["node_number"])
    named = []
    for rank in facts:
        host, number = rank["host"], rank["node_number"]
        named.append({**rank, "node": f"{host}#{number}" if len(numbers[host]) > 1 else host})
    return named


def versions() -> dict[str, str]:
    """Return the versions of everything that must be the same on all nodes; `none` if not installed."""
    found = {
        "python": platform.python_version(),
        "megatron_slm": f"{megatron_slm.__version__}, source {source_fingerprint()}",
        "architecture": platform.machine(),
        "device": "GPU" if on_gpu() else "CPU",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        found["driver"] = driver.read_text().splitlines()[0].partition("Module")[2].split("  ")[1].strip()
    return found | cuda_versions()


def disk(config: RunConfig) -> Facts | None:
    """Return the checkpoint folder's free bytes and what the run will write there; None if it writes nothing."""
    if not config.checkpoint.enabled:
        return None
    folder = Path(config.save_folder)
    try:
        one: int | None = plan_run(config).architecture.num_parameters * _BYTES_PER_PARAMETER
    except SlmError:  # shapes are unknown; the run's own plan raises this error
        one = None
    written = len(complete_checkpoints(folder)) if folder.is_dir() else 0
    return {
        "folder": str(folder),
        "free": shutil.disk_usage(existing(folder)).free,
        "checkpoint": one,
        "more": max(1, num_checkpoints(config) - written),
    }


def num_checkpoints(config: RunConfig) -> int:
    """Return the largest number of checkpoints on the disk at once: those kept, and one being written."""
    checkpoint, last = config.checkpoint, config.training.train_iters
    saves = ceil_div(last, checkpoint.save_interval) if checkpoint.save_interval else 1
    if checkpoint.keep_last is None:
        return saves
    kept = checkpoint.keep_last + 1 + (checkpoint.keep_best is not None)
    if checkpoint.save_retain_interval:
        kept += last // checkpoint.save_retain_interval
    return min(saves, kept)


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def not_writable(config: RunConfig) -> dict[str, str]:
    """Return the folders that the run needs to write to and this node cannot, with the reason."""
    folders = {"--data-cache-path": cache_folder(config)}
    if config.checkpoint.enabled:
        folders["--save"] = Path(config.save_folder)
    if os.environ["RANK"] == "0":
        folders["--run-dir"] = Path(config.logging.run_dir)
    found = {}
    for flag, folder in folders.items():
        try:
            with tempfile.TemporaryFile(dir=existing(folder)) as file:
                file.write(b"preflight")
        except OSError as error:
            found[f"{flag} {folder}"] = error.strerror or str(error)
    return found


_QUERY = "index,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,pci.bus_id"


def gpu_states() -> list[dict[str, str]]:
    """Return the state of this node's GPUs and the processes on them, from nvidia-smi; empty without GPUs."""
    if not on_gpu() or shutil.which("nvidia-smi") is None:
        return []
    options = ["--format=csv,noheader,nounits"]
    gpus, processes = (
        subprocess.run(["nvidia-smi", query, *options], capture_output=True, text=True, timeout=60, check=False).stdout
        for query in (f"--query-gpu={_QUERY}", "--query-compute-apps=gpu_bus_id,pid,process_name")
    )
    own = {str(child.pid) for child in psutil.Process(os.getppid()).children(recursive=True)}  # of the launcher
    return parse_gpus(gpus, processes, own)


def parse_gpus(gpus: str, processes: str, own: Collection[str] = ()) -> list[dict[str, str]]:
    """Parse nvidia-smi's CSV output.

    Args:
        own: process ids of this run.

    Returns:
        for each GPU: index, uncorrected ECC errors since the driver was loaded (`[N/A]` without ECC), and processes
        of others on it.
    """
    rows = [[value.strip() for value in line.split(",")] for line in gpus.splitlines() if line.strip()]
    busy: dict[str, list[str]] = {}
    for line in processes.splitlines():
        bus, _, who = line.partition(",")
        if who and who.split(",")[0].strip() not in own:
            busy.setdefault(bus.strip(), []).append(" ".join(who.replace(",", " ").split()))
    return [
        {"index": row[0], "ecc": row[3], "processes": "; ".join(busy.get(row[4], []))} for row in rows if len(row) == 5
    ]
