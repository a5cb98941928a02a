"""Preprocess, merge, inspect and verify, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus
from tests.support.commands import run_here

ROOT = Path(__file__).parents[2]
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "100")


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """A folder with two corpora with masks, from standard input."""
    for name, first in (("a", 0), ("b", 50)):
        lines = "\n".join(json.dumps({"p": str(at), "r": f"{at} 1"}) for at in range(first, first + 20))
        options = ("--prompt-key", "p", "--response-key", "r", "--append-eod")
        done = run_here("preprocess", "--input", "-", "--output-prefix", tmp_path / name, *options, *NULL, stdin=lines)
        assert done.returncode == 0, done.stderr
        assert "60 tokens" in done.stdout
    return tmp_path


def test_merge_inspect_verify(corpora: Path) -> None:
    done = run_here("merge_corpora", "--input", corpora, "--output-prefix", corpora / "out" / "both")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{corpora}/out/both: 2 corpora, 40 documents, 160 tokens\n"
    corpus = IndexedCorpus(corpora / "out" / "both")
    assert (corpus.get(0).tolist(), corpus.get(39).tolist()) == ([0, 0, 1, 100], [69, 69, 1, 100])

    show = ("--data-path", corpora / "out" / "both", "--seq-length", 6)
    shown = run_here("inspect_data", *show, "--verify", "--documents", 39, "--samples", 2, *NULL)
    assert shown.returncode == 0, shown.stderr
    assert (
        "verified: both.bin, both.idx, both_loss_mask.bin, both_loss_mask.idx match their recorded hashes"
        in shown.stdout
    )
    assert "⟦69⟧69 1 100" in shown.stdout
    assert "━━ sample 1 of 2: place 0 of step 2, sample 1 of both" in shown.stdout
    assert not list(Path.cwd().glob("runs/default/index-cache")), "looking leaves nothing behind"

    path = corpora / "out" / "both_loss_mask.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    broken = run_here("inspect_data", *show, "--verify")
    assert broken.returncode == 1
    assert broken.stderr.startswith(f"error: {path}: SHA-256 is ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", 1), "--tokenizer-model is missing: required by"),
        (("--samples", 1, *NULL[:-1], 99), "tokenizer of corpus"),
        (("--documents", 1, *NULL[:-1], 99), "must match the named tokenizer"),
        (
            ("--samples", 1, "--first-sample", 99, "--train-iters", 9, *NULL),
            "--first-sample plus --samples is 100: must be at most",
        ),
        (("--sampels", 1), "did you mean --samples?"),
        (("--seq-lenght", 6), "did you mean --seq-length?"),
    ],
)
def test_inspecting_what_cannot_be(corpora: Path, options: tuple, message: str) -> None:
    done = run_here("inspect_data", "--data-path", corpora / "a_sft_document", "--seq-length", 6, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--verify",), ("--documents", 1)])
def test_inspecting_nothing(options: tuple) -> None:
    done = run_here("inspect_data", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --data-path is missing: must name a corpus.")
    assert done.stderr.count("\n") == 1


STOPPED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from megatron_slm.data.corpus.joined_corpus import JoinedCorpus

add = JoinedCorpus.add

def add_and_be_stopped(self, part, **options):
    add(self, part, **options)
    assert self._temporary_bin.exists()
    os.kill(os.getpid(), signal.{signal})

JoinedCorpus.add = add_and_be_stopped
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize(("signal", "code", "said"), [("SIGTERM", 143, ""), ("SIGINT", 130, "interrupted\n")])
def test_a_merge_that_is_stopped_leaves_nothing(corpora: Path, signal: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", STOPPED.format(signal=signal), str(ROOT / "tools" / "merge_corpora.py")]
    command += ["--input", str(corpora), "--output-prefix", str(corpora / "out" / "both")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (code, said)
    assert not list((corpora / "out").iterdir())


def test_merging_a_folder_without_corpora(tmp_path: Path) -> None:
    done = run_here("merge_corpora", "--input", tmp_path, "--output-prefix", tmp_path / "c")
    assert done.returncode == 1
    assert "must hold a corpus" in done.stderr
