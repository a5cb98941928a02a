"""The launchers' own variables become torch's."""

from __future__ import annotations

import pytest

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.launched import complete_environment, launched_rank, planned_world_size

MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("variables", [MPI, SRUN])
def test_a_launcher_says_which_process_this_is(variables: dict[str, str]) -> None:
    environment = {**variables, "MASTER_ADDR": "node0"}
    complete_environment(environment)
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    assert {name: environment[name] for name in expected} == expected


@pytest.mark.parametrize("variables", [MPI, SRUN])
def test_the_address_of_rank_0_is_missing(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR is missing"):
        complete_environment(dict(variables))


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "4"}, {"PMI_SIZE": "2"}])
def test_several_processes_of_unknown_number(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="each process would train alone"):
        complete_environment({**variables, "MASTER_ADDR": "node0"})


def test_what_torchs_variables_say_is_left_alone() -> None:
    environment = {**SRUN, "RANK": "2", "WORLD_SIZE": "4"}
    complete_environment(environment)
    assert environment == {**SRUN, "RANK": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("variables", "rank"), [(MPI, 5), (SRUN, 5), ({**SRUN, "RANK": "2"}, 2), ({}, 0), ({"SLURM_PROCID": "3"}, 0)]
)
def test_logs_know_their_rank_before_a_process_group(variables: dict[str, str], rank: int) -> None:
    assert launched_rank(variables) == rank


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_without_a_launcher_it_is_a_world_of_one(variables: dict[str, str]) -> None:
    environment = dict(variables)
    complete_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert int(environment["MASTER_PORT"]) > 0


def test_a_dry_run_plans_for_a_number_of_processes() -> None:
    assert planned_world_size(2, {}) == 2
    assert planned_world_size(2, {"WORLD_SIZE": "64"}) == 64
    for value in ("many", "", "0", "-1"):
        with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{value}': must be a whole number"):
            planned_world_size(2, {"WORLD_SIZE": value})
