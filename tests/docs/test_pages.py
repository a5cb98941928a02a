"""Pages are true: links lead somewhere, flags in commands exist, Python runs, generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import random_hf_model
from tests.support.pages import ROOT, SUBCOMMANDS, WITH_RUN_FLAGS, blocks, help_text, modules, tool_commands

PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")]
    if not path.name.endswith(".head.md")
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def _anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    path, broken = ROOT / name, []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", path.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor[1:] not in _anchors(file)):
            broken.append(target + anchor)
    assert not broken


@pytest.mark.parametrize("name", [name for name in NAMES if list(tool_commands(ROOT / name))])
def test_flags_in_commands_exist(name: str) -> None:
    wrong = []
    for tool, *words in tool_commands(ROOT / name):
        module = modules()[Path(tool).name]
        subcommand = words[0] if module in SUBCOMMANDS and words and not words[0].startswith("-") else None
        text = help_text(module, subcommand)
        if module in WITH_RUN_FLAGS:
            text += help_text("pretrain", None)
        for word in words[: words.index("--") if "--" in words else None]:
            flag = word.partition("=")[0]
            positive = flag.replace("--no-", "--", 1)
            if flag.startswith("--") and not any(re.search(rf"{one}\b", text) for one in (flag, positive)):
                wrong.append(f"{tool} {subcommand or ''} {flag}")
    assert not wrong


def test_python_of_extending_runs() -> None:
    scope: dict[str, Any] = {"__name__": "extending"}
    found = blocks(ROOT / "docs/extending.md", "python")
    assert len(found) >= 6
    for block in found:
        exec(compile(block, "docs/extending.md", "exec"), scope)


def test_python_of_the_readme_trains() -> None:
    shape = dict(vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    model, reference = (random_hf_model("Llama", seed, **shape) for seed in (0, 1))
    before = model.lm_head.weight.detach().clone()
    scope = {
        "model": model,
        "reference": reference,
        "batches": [torch.randint(53, (2, 17)) for _ in range(2)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    (block,) = blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), scope)
    assert not torch.equal(before, model.lm_head.weight)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/reference_pages.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="needs pip install '.[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference/python/index.html").read_text().count("doc-heading") > 10


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples/notebooks/selective_tokens.ipynb", 4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    sums, others = map(int, re.findall(r"(\d+)% of the (?:tokens of sums|others)", "".join(texts)))
    assert sums > others


@pytest.mark.slow
def test_the_wheel_installs_and_trains_outside_of_the_checkout() -> None:
    site = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    done = subprocess.run(
        ["bash", "tools/check_package.sh", site], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built, installed and used" in done.stdout
