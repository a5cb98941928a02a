"""Commands of the README and the tutorial parse, and (slow) run from a fresh environment, at sizes for a CPU."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.errors import SlmError
from tests.support.hub_models import save_model_and_tokenizer, write_text
from tests.support.pages import ROOT, check_words, command_lines, modules, tool_commands
from tests.support.world import free_port

PAGES = ["README.md", "docs/tutorial.md", "docs/own-data.md", "examples/quickstart/README.md"]
OF_THE_CHECKOUT = ("docs/", "ds_configs/", "examples/", "tests/", "tools/")
PROGRAMS = {"bash", "deepspeed", "export", "pip", "python"}
"""Programs that are not ours."""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the flags' names: values, required flags, and flags that exclude each other too."""
    monkeypatch.chdir(ROOT)
    for tool, *words in tool_commands(ROOT / page):
        try:
            check_words(modules()[Path(tool).name], words)
        except SlmError as error:
            pytest.fail(f"{tool} {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_every_program_and_file_of_the_checkout_exists(page: str) -> None:
    for words in command_lines(ROOT / page):
        assert words[0] in PROGRAMS | modules().keys(), words
        for word in words:
            path = re.sub(r"^.*=", "", word)
            assert not path.startswith(OF_THE_CHECKOUT) or (ROOT / path).exists(), words


@pytest.mark.parametrize(
    ("module", "words", "match"),
    [
        ("convert", "export --load a", "--output is missing"),
        ("convert", "export --load a --output b --dtype fp17", "--dtype is 'fp17'"),
        ("report", "runs/slm --axis hours", "--axis hours"),
        ("pretrain", "--train-iters 3 --slm-keep-ratio 1.5", "--slm-keep-ratio is 1.5"),
        ("score", "--config examples/quickstart/train.yaml --ouput x", "--ouput"),
        ("plan", "search --config examples/quickstart/train.yaml --gpu h100 --nodes x", "--nodes"),
    ],
)
def test_a_wrong_command_is_found(module: str, words: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SlmError, match=match):
        check_words(module, words.split())


SMALL = {
    "--num_gpus": "2", "--seq-length": "32", "--micro-batch-size": "1", "--global-batch-size": "4", "--train-iters": "3",
    "--save-interval": "3",
}  # fmt: skip
"""Values of flags that fit two CPU cores and a second a step."""
NOT_RUN = (["pip"], ["bash", "tests/run.sh"])
"""The fresh environment is made by the test, and the tests do not run themselves."""


def small(words: list[str]) -> list[str]:
    """A command at a size for a CPU, with outputs of its own where the quickstart has written already."""
    out = list(words)
    for at, word in enumerate(words[:-1]):
        if word in SMALL and "examples/quickstart/train.yaml" not in words:
            out[at + 1] = SMALL[word]
        if word == "--run-dir":
            out[at + 1] = words[at + 1].replace("runs/quickstart", "runs/tutorial")
    if "--bf16" in out:
        out[out.index("--bf16")] = "--deepspeed-config=ds_configs/fp32_cpu.json"
    if out[0] == "deepspeed":
        out[1:1] = ["--master_port", str(free_port())]
    return [*out, "--overwrite"] if out[:2] == ["slm-convert", "export"] else out


def fresh_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """A checkout with an environment of its own, in which only the dependencies come from this one."""
    checkout = folder / "checkout"
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    python = folder / "fresh/bin/python"
    subprocess.run([sys.executable, "-m", "venv", folder / "fresh"], check=True)
    site = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (fresh_site,) = (folder / "fresh/lib").glob("python3*/site-packages")
    (fresh_site / "parent.pth").write_text(site + "\n")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "-e", checkout], check=True)
    launcher = python.with_name("deepspeed")
    launcher.write_text(f"#!{python}\nfrom deepspeed.launcher.runner import main\nmain()\n")
    launcher.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{python.parent}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return checkout, environment | {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_run_in_a_fresh_environment(tmp_path: Path) -> None:
    checkout, environment = fresh_environment(tmp_path)
    for name in ("base", "reference"):
        save_model_and_tokenizer(checkout / "path/to" / name, seed=len(name))
    text = write_text(tmp_path / "text.txt", words=4000).read_text().split()
    with gzip.open(checkout / "web.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": " ".join(text[i : i + 50])}) + "\n" for i in range(0, len(text), 50))
    settings = checkout / "examples/quickstart/train.yaml"
    shorter = {"train-iters: 360": "train-iters: 4", "interval: 360": "interval: 4", "interval: 60": "interval: 4",
               "warmup-iters: 20": "warmup-iters: 2"}  # fmt: skip
    for long, short in shorter.items():
        assert long in settings.read_text()
        settings.write_text(settings.read_text().replace(long, short))
    ran = set()
    for page in ("README.md", "docs/tutorial.md"):
        for words in map(small, command_lines(ROOT / page)):
            if tuple(words) in ran or any(words[: len(skipped)] == skipped for skipped in NOT_RUN):
                continue
            done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            ran.add(tuple(words))
    for made in ("hf_slm/model.safetensors", "runs/slm/report.html", "runs/quickstart/report.html",
                 "runs/quickstart/tokens.html", "runs/tutorial/slm/metrics.jsonl"):  # fmt: skip
        assert (checkout / made).is_file(), made
