"""Reads rank and world size from the launcher's environment variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from megatron_slm.errors import ConfigError

SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
DEFAULT_PORT = "29500"

_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI's mpirun
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "SLURM_LOCALID"),  # Slurm's srun; not in the batch script itself
}
"""Variable with the world size: variables with the rank and the local rank."""

_UNKNOWN = ("SLURM_NTASKS", "PMI_SIZE")


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process by its launcher's variables, 0 for a single process; for logs at start."""
    if "RANK" in environment:
        return int(environment["RANK"])
    for size, (rank, _) in _LAUNCHERS.items():
        if int(environment.get(size, "1")) > 1 and rank in environment:
            return int(environment[rank])
    return 0


def complete_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, from which torch creates its process group.

    `deepspeed` and `torchrun` set them. mpirun and srun set variables of their own, without the address of rank 0.
    Without any of them this is a world of one process.

    Raises:
        ConfigError: several processes without a rank, or without the address of rank 0.
    """
    if "RANK" in environment:
        return
    for size, (rank, local_rank) in _LAUNCHERS.items():
        if int(environment.get(size, "1")) > 1 and rank in environment:
            if "MASTER_ADDR" not in environment:
                raise ConfigError.missing(
                    "MASTER_ADDR",
                    f"{size}={environment[size]} (several processes)",
                    "export the address of rank 0's node, in .deepspeed_env for "
                    "`deepspeed --launcher openmpi`, in the batch script for srun",
                )
            environment.update(WORLD_SIZE=environment[size], RANK=environment[rank])
            environment["LOCAL_RANK"] = environment.get(local_rank, "0")
            environment.setdefault("MASTER_PORT", DEFAULT_PORT)
            return
    for name in _UNKNOWN:
        if name == "SLURM_NTASKS" and "SLURM_STEP_NUM_TASKS" in environment:
            continue  # this step has one task, whatever the allocation has (srun --pty -n1)
        if int(environment.get(name, "1")) > 1:
            raise ConfigError(
                name,
                environment[name],
                "be 1 without RANK and WORLD_SIZE (each process would train alone)",
                "start with `deepspeed`, `torchrun` or srun, or set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR",
            )
    environment.update(SINGLE_PROCESS)
    environment.setdefault("MASTER_PORT", _free_port())


def planned_world_size(least: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the world size of a dry run: WORLD_SIZE, or `least`, the fewest processes of the layout.

    Raises:
        ConfigError: WORLD_SIZE is not a whole number of at least 1.
    """
    size = environment.get("WORLD_SIZE", str(least))
    if not (size.isascii() and size.isdigit() and int(size) >= 1):
        raise ConfigError("WORLD_SIZE", size, "be a whole number of at least 1", "export the number of processes")
    return int(size)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
