"""Which process of which world this is, as whatever launched it says in the environment."""

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
"""The variable with the number of processes, and those with this one's number in the world and on its node."""

_UNKNOWN = ("SLURM_NTASKS", "PMI_SIZE")


def complete_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Fill in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, by which torch makes its process group.

    `deepspeed` and `torchrun` set them. mpirun and srun say the same in variables of their own, but for the address of
    rank 0. Without any of them this is a world of one process.

    Raises:
        ConfigError: several processes were started without saying which one this is, or where rank 0 is.
    """
    if "RANK" in environment:
        return
    for size, (rank, local_rank) in _LAUNCHERS.items():
        if int(environment.get(size, "1")) > 1 and rank in environment:
            if "MASTER_ADDR" not in environment:
                raise ConfigError(
                    "MASTER_ADDR",
                    None,
                    f"is set with {size}={environment[size]} (the address of the node of rank 0)",
                    "export it: in .deepspeed_env for `deepspeed --launcher openmpi`, in the batch script for srun",
                )
            environment.update(WORLD_SIZE=environment[size], RANK=environment[rank])
            environment["LOCAL_RANK"] = environment.get(local_rank, "0")
            environment.setdefault("MASTER_PORT", DEFAULT_PORT)
            return
    for name in _UNKNOWN:
        if int(environment.get(name, "1")) > 1:
            raise ConfigError(
                name,
                environment[name],
                "is 1 without RANK and WORLD_SIZE (each process would train alone)",
                "start with `deepspeed`, `torchrun` or srun, or set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR",
            )
    environment.update(SINGLE_PROCESS)
    environment.setdefault("MASTER_PORT", _free_port())


def planned_world_size(least: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes that a dry run plans for: WORLD_SIZE, or as few as the layout needs.

    Raises:
        ConfigError: WORLD_SIZE is no number of processes.
    """
    said = environment.get("WORLD_SIZE", str(least))
    if not (said.isascii() and said.isdigit() and int(said) >= 1):
        raise ConfigError("WORLD_SIZE", said, "is a whole number of at least 1", "export the number of processes")
    return int(said)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
