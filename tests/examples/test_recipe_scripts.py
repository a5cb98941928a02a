"""The recipes' scripts: every command they give is one the tools take, on one machine, several, and under Slurm."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.checkpoint.state import RunState
from megatron_slm.cli.score import parse_scoring
from megatron_slm.config.load import parse
from megatron_slm.config.run import RunConfig
from megatron_slm.planning.planned_run import plan_run
from tests.examples.recipes import EXAMPLES, FOLDERS, ROOT, flags_of_tool

SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch"), ROOT / "tools/environment.sh"])


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "HOSTFILE", "GPUS", "NODES", "GPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_are_sound(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    if shutil.which("shellcheck"):
        # SC1090/1091: sourced files; SC2034, SC2154: names that one file sets and another reads
        words = [
            "shellcheck",
            "--shell=bash",
            "--severity=warning",
            "--exclude=SC1090,SC1091,SC2034,SC2154",
            str(script),
        ]
        checked = subprocess.run(words, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


RECORDER = """#!/usr/bin/env bash
name="${0##*/}"
if [ "$name" = python ] && { [ "$1" = -W ] || [ "$1" = -c ]; }; then exit 0; fi
if [ "$name" = python ] && [ "$1" = examples/launch/run_state.py ]; then
  if [ -n "${ALL_COMPLETE:-}" ] && [ "$2" = stopped ]; then exit 0; fi
  exec "%(python)s" "$@"
fi
{ printf '%%s\\x1f' "$name" "$@"; echo; } >> "%(log)s"
case "$name" in
  scontrol) printf 'node1\\nnode2\\n' ;;
  hostname) echo node1 ;;
  srun) cat runs/current.7 >> "%(log)s.current" 2> /dev/null || echo none >> "%(log)s.current"
    while [ "$1" != bash ]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@"; done ;;
esac
"""
VARIANTS = {
    "one machine": {},
    "hostfile": {"HOSTFILE": "hosts"},
    "slurm": {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "GPUS": "4"},
}


def make_checkout(tmp_path: Path, extra: str = "") -> dict[str, str]:
    """A copy of the checkout's scripts; the environment in which stand-ins take down what they would start.

    Args:
        extra: what the stand-ins do besides; `$name` says which of them it is.
    """
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name in ("python", "deepspeed", "srun", "scontrol", "hostname"):
        written = RECORDER % {"log": tmp_path / "commands", "python": sys.executable}
        (stand_ins / name).write_text(written + extra)
        (stand_ins / name).chmod(0o755)
    for folder in ("examples", "tools", "ds_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def run_words(tmp_path: Path, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def recorded(tmp_path: Path) -> list[list[str]]:
    log = tmp_path / "commands"
    return [line.split("\x1f")[:-1] for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def run_recorded(tmp_path: Path, words: list[str], environment: dict[str, str]) -> list[list[str]]:
    """What a script would start, where every run is complete when its launch has ended."""
    done = run_words(tmp_path, words, {**make_checkout(tmp_path), "ALL_COMPLETE": "1", **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return recorded(tmp_path)


@functools.cache
def run_of(script: str, *words: str) -> RunConfig:
    """The run that a command asks for, by our own parsers."""
    return parse_scoring(words)[0] if script == "tools/score_corpus.py" else parse(words)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_command_of_a_recipe_is_accepted(folder: Path, variant: str, tmp_path: Path) -> None:
    """By the launcher's parser and by our own; flags of the user's own arrive at every launch."""
    from deepspeed.launcher.runner import parse_args

    script = f"examples/{folder.name}/run.sh"
    words = [script] if variant != "slurm" else ["examples/launch/slurm.sbatch", folder.name]
    commands = run_recorded(tmp_path, [*words, "--seed", "77"], VARIANTS[variant])
    steps = re.search(r"steps_are (.*)", (ROOT / script).read_text())
    assert steps is not None
    launches = [words for name, *words in commands if name == "deepspeed"]
    nodes = 2 if variant == "slurm" else 1
    assert len(launches) == nodes * (len(steps[1].split()) - 2), "all steps but data and export, on each node"
    named: set[str] = set()
    if variant == "slurm":  # what may be told to stop, while each is under way
        runs = [run_of(*words[words.index("--master_port") + 2 :]) for words in launches[::2]]
        scores = ["tools/score_corpus.py" in words for words in launches[::2]]
        assert (tmp_path / "commands.current").read_text().splitlines() == [
            "none" if score else run.logging.run_dir for run, score in zip(runs, scores, strict=True)
        ]
        assert not (tmp_path / "runs/current.7").exists()
    for number, words in enumerate(launches):
        launcher = parse_args(words)
        run = run_of(launcher.user_script, *launcher.user_args)
        assert run.training.seed == 77
        named |= {*run.data.data_path, *run.data.valid_data_path}
        assert (ROOT / launcher.user_script).is_file()
        if variant == "hostfile":
            assert launcher.hostfile == "hosts"
        if variant == "slurm":
            assert launcher.no_ssh
            assert launcher.node_rank == number % 2
            assert launcher.master_addr == "node1"
            assert (tmp_path / launcher.hostfile).read_text() == "node1 slots=4\nnode2 slots=4\n"
    tools = [words for name, *words in commands if name == "python"]
    assert {words[0] for words in tools} == {"tools/preprocess_data.py", "tools/convert_checkpoint.py"}
    for words in tools:
        known = flags_of_tool(words[0])
        assert {word for word in words if word.startswith("--")} <= known
    made = {
        words[words.index("--output-prefix") + 1] + "_text_document" for words in tools if "--output-prefix" in words
    }
    read = {word.partition("=")[2] or word for word in named if "/" in word}
    assert read <= made, "what is trained on is made by the step data"


# Runs that are stopped.


def save_checkpoint(folder: Path, step: int) -> None:
    """What is read of a checkpoint to know how far its run is."""
    architecture = plan_run(parse(["--config", "examples/rho1_math_1b/slm.yaml"])[0]).architecture
    made = folder / f"step_{step:08d}"
    made.mkdir(parents=True)
    nothing: dict[str, Any] = dict.fromkeys(("tokenizer_fingerprint", "sample_order"))
    Manifest(
        state=RunState(step=step, consumed_samples=step, adam_step=step),
        architecture=architecture,
        layout={},
        files={},
        **nothing,
    ).write(made)


@pytest.mark.parametrize(
    ("reached", "launched", "slurm"), [(None, 1, False), (1430, 1, False), (1431, 2, False), (None, 1, True)]
)
def test_a_run_that_was_stopped_is_not_taken_for_a_whole_one(
    reached: int | None, launched: int, slurm: bool, tmp_path: Path
) -> None:
    """Also where it was stopped before there was anything to save."""
    save_checkpoint(tmp_path / "runs/rho1_math_1b/slm/checkpoints", 14306)
    if reached is not None:
        save_checkpoint(tmp_path / "runs/rho1_math_1b/reference/checkpoints", reached)
    words = ["examples/launch/slurm.sbatch", "rho1_math_1b"] if slurm else ["examples/rho1_math_1b/run.sh"]
    done = run_words(tmp_path, words, {**make_checkout(tmp_path), **(VARIANTS["slurm"] if slurm else {})})
    assert done.returncode == 0, done.stderr
    commands = recorded(tmp_path)
    nodes = 2 if slurm else 1
    assert [words[0] for words in commands].count("deepspeed") == launched * nodes
    assert any("tools/convert_checkpoint.py" in words for words in commands) == (launched == 2)
    said = {
        None: "runs/rho1_math_1b/reference was stopped before its first checkpoint; run the same command to start it again.",
        1430: "runs/rho1_math_1b/reference was stopped at step 1430 of 1431; run the same command to resume it.",
        1431: None,
    }[reached]
    assert [line for line in done.stdout.splitlines() if "was stopped" in line] == ([said] if said else [])


WRITINGS = {
    "a comment": ("run-dir: runs/mine  # ours", [], "runs/mine"),
    "quotes": ('run-dir: "runs/q"', [], "runs/q"),
    "a flag with an equals sign": ("", ["--run-dir=runs/flag"], "runs/flag"),
    "underscores": ("", ["--run_dir", "runs/flag"], "runs/flag"),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_a_runs_folder_is_the_one_the_trainer_takes(writing: str, tmp_path: Path) -> None:
    line, words, run = WRITINGS[writing]
    environment = {**make_checkout(tmp_path), **VARIANTS["slurm"]}
    config = tmp_path / "examples/rho1_math_1b/slm.yaml"
    if line:
        config.write_text(config.read_text().replace("run-dir: runs/rho1_math_1b/slm", line))
    save_checkpoint(tmp_path / run / "checkpoints", 3)
    done = run_words(tmp_path, ["examples/rho1_math_1b/run.sh", "slm", "export", *words], environment)
    assert done.returncode == 0, done.stderr
    assert f"{run} was stopped at step 3 of 14306" in done.stdout
    assert (tmp_path / "commands.current").read_text() == f"{run}\n"
    assert "python" not in [words[0] for words in recorded(tmp_path)], "half a run is not exported"


def test_a_run_is_as_far_as_the_folder_it_saves_to(tmp_path: Path) -> None:
    environment = make_checkout(tmp_path)
    save_checkpoint(tmp_path / "elsewhere", 7)
    words = ["examples/rho1_math_1b/run.sh", "slm", "--save", "elsewhere", "--train-iters"]
    assert "stopped at step 7 of 8;" in run_words(tmp_path, [*words, "8"], environment).stdout
    assert "stopped" not in run_words(tmp_path, [*words, "7"], environment).stdout


@pytest.mark.parametrize("flag", [["--save-interval", "null"], ["--dry-run"]], ids=" ".join)
def test_what_saves_nothing_is_taken_for_complete(flag: list[str], tmp_path: Path) -> None:
    words = ["examples/rho1_math_1b/run.sh", "slm", "export", *flag]
    done = run_words(tmp_path, words, make_checkout(tmp_path))
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path)[-1][1] == "tools/convert_checkpoint.py"


@pytest.mark.parametrize("variant", ["one machine", "slurm"])
def test_flags_that_cannot_be_read_end_the_script(variant: str, tmp_path: Path) -> None:
    words = ["examples/rho1_math_1b/run.sh", "slm", "export", "--train-itters", "3"]
    done = run_words(tmp_path, words, {**make_checkout(tmp_path), **VARIANTS[variant]})
    assert done.returncode == 2
    assert "error: flag is '--train-itters'" in done.stderr
    assert [words[0] for words in recorded(tmp_path)] == ([] if variant == "slurm" else ["deepspeed"])


def test_a_checkpoint_that_cannot_be_read_ends_the_script(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "runs/rho1_math_1b/slm/checkpoints", 14306)
    (tmp_path / "runs/rho1_math_1b/slm/checkpoints/step_00014306/manifest.json").write_text("{")
    done = run_words(tmp_path, ["examples/rho1_math_1b/run.sh", "slm", "export"], make_checkout(tmp_path))
    assert done.returncode == 2
    assert "must be valid JSON" in done.stderr


def test_a_stop_that_no_run_saw_does_not_stop_the_next(tmp_path: Path) -> None:
    run = tmp_path / "runs/rho1_math_1b/slm"
    save_checkpoint(run / "checkpoints", 14306)
    (run / "STOP").touch()
    notes = '[ "$name" != srun ] || [ ! -e runs/rho1_math_1b/slm/STOP ] || touch seen\n'
    environment = {**make_checkout(tmp_path), **VARIANTS["slurm"]}
    (tmp_path / "bin/srun").write_text((tmp_path / "bin/srun").read_text().replace("{ printf", notes + "{ printf", 1))
    done = run_words(tmp_path, ["examples/launch/slurm.sbatch", "rho1_math_1b", "slm"], environment)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "seen").exists()


def test_a_launch_that_fails_ends_the_job_with_its_code(tmp_path: Path) -> None:
    environment = {**make_checkout(tmp_path, 'if [ "$name" = srun ]; then exit 9; fi\n'), **VARIANTS["slurm"]}
    done = run_words(tmp_path, ["examples/launch/slurm.sbatch", "rho1_math_1b", "slm", "export"], environment)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "runs/current.7").exists()
    assert not any("tools/convert_checkpoint.py" in words for words in recorded(tmp_path))


def signalled(tmp_path: Path, recipe: str, sent: signal.Signals, **environment: str) -> int:
    """The batch script's exit code, where Slurm signals it while a recipe, that has made `begun`, is under way."""
    (tmp_path / "examples/slow").mkdir(parents=True)
    (tmp_path / "examples/slow/run.sh").write_text(recipe)
    with subprocess.Popen(
        ["bash", str(ROOT / "examples/launch/slurm.sbatch"), "slow"],
        cwd=tmp_path,
        env={**os.environ, "SLURM_JOB_ID": "7", **environment},
    ) as batch:
        while not (tmp_path / "begun").exists() and batch.poll() is None:
            time.sleep(0.05)
        batch.send_signal(sent)
        return batch.wait(timeout=60)


def under_way(tmp_path: Path) -> None:
    (tmp_path / "runs/slow/slm").mkdir(parents=True)
    (tmp_path / "runs/current.7").write_text("runs/slow/slm\n")


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_slurms_signal_stops_a_recipe(sent: signal.Signals, tmp_path: Path) -> None:
    """The batch script asks the runs that are under way to stop, and waits for them."""
    under_way(tmp_path)
    waits = "touch begun; until [ -e runs/slow/slm/STOP ]; do sleep 0.1; done; sleep 0.3; echo saved > saved; exit 7"
    assert signalled(tmp_path, waits, sent) == 7
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("named", [False, True], ids=["no run", "a run without a folder"])
def test_slurms_signal_does_no_harm_where_nothing_can_be_stopped(
    named: bool, sent: signal.Signals, tmp_path: Path
) -> None:
    if named:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/current.7").write_text("runs/slow/slm\n")
    assert signalled(tmp_path, "touch begun; sleep 1; echo done > done; exit 7", sent) == 7
    assert (tmp_path / "done").exists()
    assert not (tmp_path / "runs/slow").exists()


def test_the_exit_code_is_the_recipes_where_it_ends_while_it_is_asked_to_stop(tmp_path: Path) -> None:
    under_way(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/touch").write_text('#!/usr/bin/env bash\n: > "$1"\nsleep 1.5\n')  # the recipe has ended by then
    (tmp_path / "bin/touch").chmod(0o755)
    waits = ": > begun; until [ -e runs/slow/slm/STOP ]; do sleep 0.1; done; exit 7"
    assert signalled(tmp_path, waits, signal.SIGUSR1, PATH=f"{tmp_path}/bin:{os.environ['PATH']}") == 7


def test_slurms_signal_is_expected_before_the_recipe_begins() -> None:
    lines = (EXAMPLES / "launch/slurm.sbatch").read_text().splitlines()
    begins = [number for number, line in enumerate(lines) if line.endswith('"$@" &')]
    assert [number < begins[0] for number, line in enumerate(lines) if line.startswith("trap ")] == [True]


def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    words = ["bash", "examples/rho1_math_1b/run.sh", "slmm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})  # fmt: skip
    assert done.returncode == 2
    assert "step is 'slmm': must be one of plan data reference slm export" in done.stderr


def test_one_step_can_be_planned(tmp_path: Path) -> None:
    commands = run_recorded(tmp_path, ["examples/rho1_math_1b/run.sh", "plan", "slm", "--lr", "1e-5"], {"GPU": "h100"})
    config = ["--config", "examples/rho1_math_1b/slm.yaml", "--lr", "1e-5"]
    gpus = ["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100"]
    assert sorted(commands) == [
        ["python", "tools/plan.py", "layout", *gpus, *config],
        ["python", "tools/pretrain_slm.py", *config, "--dry-run", "--without-files"],
    ]
