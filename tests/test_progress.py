"""Progress of tools: counts, rate and time left; a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_slm import progress as module
from megatron_slm.cli import checkpoint, convert, evaluate, merge_corpora, train_tokenizer
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.progress import Progress, show_progress, track
from tests.support.hub_models import save_model_and_tokenizer, write_text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron_slm"), "propagate", True)
    caplog.set_level(logging.INFO, "megatron_slm")
    return caplog


def test_a_line_has_counts_rate_and_time_left(lines: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with show_progress("merging", 100, "files", clock=clock) as progress:
        for clock.now in range(1, 31):
            progress.update(2 * clock.now)
        clock.now = 31
    assert lines.messages == [
        "merging: 20 of 100 files, 2 files/s, 0:00:40 left",
        "merging: 40 of 100 files, 2 files/s, 0:00:30 left",
        "merging: 60 of 100 files, 2 files/s, 0:00:20 left",
        "merging: 60 of 100 files, 1.9 files/s, 0:00:21 left",
    ]


def test_bytes_are_megabytes_and_an_unknown_total_has_no_time_left() -> None:
    clock = Clock()
    progress = Progress("reading", None, "B", clock=clock)
    progress.done = 3_500_000
    assert progress.text(2.0) == "3.5 MB, 1.8 MB/s"


def test_short_work_and_other_ranks_print_nothing(lines: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with show_progress("short", 3, "files", clock=clock) as progress:
        clock.now = 9.9
        progress.advance(3)
    with show_progress("elsewhere", 3, "files", shown=False, clock=clock) as progress:
        clock.now = 99
        progress.advance(3)
    assert lines.messages == []


def test_track_yields_every_item_and_can_be_left_early() -> None:
    def items() -> Iterator[int]:
        yield from range(5)

    assert list(track(items(), "x", "items")) == list(range(5))
    for item in track(range(5), "x", "items"):
        if item == 2:
            break
    assert item == 2


def test_a_terminal_gets_a_bar() -> None:
    code = "from megatron_slm.progress import track\nfor _ in track(range(3), 'counting', 'files'): pass"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # the terminal's other end is closed
        pass
    assert "counting" in shown.decode()
    assert "━" in shown.decode()
    assert "3 of 3 files" in shown.decode()


def test_the_tools_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line that is due, as if ten seconds had passed."""
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    model = save_model_and_tokenizer(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", words=300)
    for name in ("a", "b"):
        with IndexedCorpusWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(list(range(40)))

    def errors(command: object, *words: object) -> str:
        assert command.main([*map(str, words)]) == 0  # type: ignore[attr-defined]
        return capsys.readouterr().err

    assert "both: 0.00016 of 0.00016 MB" in errors(
        merge_corpora, "--input", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "both"
    )
    assert " MB/s" in errors(convert, "import", "--hf", model, "--output", tmp_path / "checkpoints")
    shown = errors(convert, "export", "--load", tmp_path / "checkpoints", "--output", tmp_path / "hf")
    assert "writing weights: " in shown
    assert "comparing with transformers: 6 of 6 blocks" in shown
    assert " MB/s" in errors(checkpoint, "verify", tmp_path / "checkpoints")
    assert "losses of model: " in errors(evaluate, "--model", model, "--perplexity", f"x={text}", "--seq-length", 32)
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"word {i} of some text"}) + "\n" for i in range(200)))
    words = ["--input", documents, "--vocab-size", 300, "--output", tmp_path / "tokenizer"]
    assert "reading: 200 documents" in errors(train_tokenizer, *words)
