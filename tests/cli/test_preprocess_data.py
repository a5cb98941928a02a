"""The preprocessing tool as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import read_sidecar

ROOT = Path(__file__).parents[2]
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "100")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """500 documents, one of them empty, and one line that is none."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"{at % 90} 1"}) for at in range(499)]
    path.write_text("\n".join([*lines, '{"text": ""}', "{"]))
    return path


def test_writes_a_corpus_and_says_what_it_did(documents: Path, tmp_path: Path) -> None:
    options = ("--append-eod", "--workers", 2, "--on-error", "skip", "--log-interval", 200)
    done = run("--input", documents, "--output-prefix", tmp_path / "c", *NULL, *options)
    assert done.returncode == 0, done.stderr
    corpus, sidecar = IndexedCorpus(tmp_path / "c_text_document"), read_sidecar(tmp_path / "c_text_document")
    assert (corpus.num_documents, corpus.num_sequences, corpus.num_tokens) == (500, 499, 1497)
    assert corpus.get(0).tolist() == [0, 1, 100]
    assert sidecar is not None
    assert "--append-eod --workers 2" in sidecar.command
    header, _, row, *notes = done.stdout.splitlines()
    assert header.split() == ["corpus", "documents", "tokens", "empty", "invalid", "longest", "MB/s"]
    assert row.split()[:6] == ["c_text_document", "500", "1497", "1", "1", "3"]
    assert any("in.jsonl:501: not JSON" in line for line in notes)
    assert any(line.startswith("documents end with the token ") for line in notes)
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["500"]
    assert "MB/s" in done.stderr


def test_one_line_for_an_error_of_the_user(documents: Path, tmp_path: Path) -> None:
    done = run("--input", documents, "--output-prefix", tmp_path / "c", *NULL)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --input is ")
    assert "in.jsonl:501" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_unknown_flag_names_the_nearest(documents: Path) -> None:
    done = run("--input", documents, "--output_prefix", "x", *NULL)
    assert done.returncode == 1
    assert "did you mean --output-prefix?" in done.stderr


def test_one_worker_is_one_core_and_one_thread(documents: Path, tmp_path: Path) -> None:
    """Whatever the environment says, or does not."""
    arguments = ["--input", documents, "--output-prefix", tmp_path / "c", *NULL, "--on-error", "skip"]
    code = (
        "import os, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, len(os.listdir('/proc/self/task')), os.environ['TOKENIZERS_PARALLELISM'])\n"
    )
    words = [sys.executable, "-c", code, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    unset = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    }
    done = subprocess.run(words, env={**unset, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "0 1 false", done.stderr
