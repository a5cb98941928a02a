"""Workers: bounded read-ahead, errors passed on, killed processes, orphans."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.preprocessing import shards as module
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.encoding import Encoding
from megatron_slm.data.preprocessing.inputs import StreamedLines, TextLine
from megatron_slm.data.preprocessing.shards import ShardWriter, make_shards
from megatron_slm.data.tokenizers.registry import NullTokenizer
from megatron_slm.errors import ConfigError, CorpusError, VocabularyError
from tests.data.texts import write_json_lines

ROOT = Path(__file__).parents[3]


def writer(folder: Path, **changed) -> ShardWriter:
    """Ids as text."""
    encoding = Encoding(keys=DocumentKeys(), bos_id=None, eod_id=100)
    values = {"encoding": encoding, "encoder": NullTokenizer(100), "dtype": "uint16", "folder": folder}
    return ShardWriter(**{**values, "stop_at_invalid": True, "identity": "x", **changed})


def chunk(text: str) -> StreamedLines:
    """One document."""
    return StreamedLines("f", 1, b'{"text": "%s"}\n' % text.encode())


def test_read_ahead_is_bounded(tmp_path: Path) -> None:
    """The input is not read to its end while the first result waits to be taken."""
    taken = 0

    def chunks() -> Iterator[StreamedLines]:
        nonlocal taken
        for at in range(1000):
            taken = at + 1
            yield chunk(str(at % 90))

    results = make_shards(chunks(), writer(tmp_path), 2)
    first, shard = next(results)
    assert (first, shard.corpora[0].num_tokens) == (chunk("0"), 2)
    assert taken == 2 * module._CHUNKS_AHEAD_PER_WORKER
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_worker_arrive(tmp_path: Path, workers: int) -> None:
    with pytest.raises(VocabularyError, match="word for NullTokenizer is '1000'"):
        list(make_shards([chunk("1000")], writer(tmp_path), workers))
    assert list(tmp_path.iterdir()) == []


class Killer:
    """A chunk that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)

    def identity(self) -> str:
        """Unique."""
        return "killer"


def test_a_killed_worker_is_no_hang(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers is 2: must keep all processes alive; one was killed"):
        list(make_shards([Killer()], writer(tmp_path), 2))  # type: ignore[list-item]


def test_equal_chunks_are_made_once(tmp_path: Path) -> None:
    """Of a file that is named twice: two workers would write the same files at once."""
    made = list(make_shards([chunk("1"), chunk("2"), chunk("1"), chunk("1"), chunk("1")], writer(tmp_path), 2))
    names = [shard.name for _, shard in made]
    assert [len(set(names)), names.count(names[0])] == [2, 4]
    assert made[2][1] is made[0][1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_without_room_for_shards(tmp_path: Path, workers: int) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(CorpusError, match=r"--output-prefix is .*: must be writable \(File too large\)"):
            list(make_shards([chunk("1 " * 10_000)], writer(tmp_path), workers))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(tmp_path.iterdir()) == []


class ThreadCount(StreamedLines):
    """A chunk whose text is the number of threads of the process that reads it."""

    def lines(self, columns) -> Iterator[TextLine]:
        yield TextLine(0, 1, {"text": str(len(os.listdir("/proc/self/task")))}, "")


def test_a_worker_has_one_thread(tmp_path: Path) -> None:
    """With a second one, even asleep, malloc takes locks: tokenizers become 8 % slower."""
    [(_, shard)] = make_shards([ThreadCount("f", 1, b"")], writer(tmp_path), 2)
    assert shard.corpora[0].max_token_id == 100, "the end of the document"
    assert np.fromfile(f"{shard.prefix(tmp_path, 0)}.bin", np.uint16).tolist() == [1, 100]


def test_a_shard_is_found_again_only_where_all_is_the_same(tmp_path: Path) -> None:
    first = writer(tmp_path).make(chunk("1"))
    assert not first.resumed
    assert writer(tmp_path).make(chunk("1")).resumed
    assert not writer(tmp_path, identity="y").make(chunk("1")).resumed
    assert not writer(tmp_path).make(chunk("2")).resumed
    (tmp_path / f"{first.name}.json").write_text("{")
    assert not writer(tmp_path).make(chunk("1")).resumed


def test_shards_with_invalid_lines_do_not_survive_a_stop(tmp_path: Path) -> None:
    class Bad(StreamedLines):
        def lines(self, columns) -> Iterator[TextLine]:
            yield TextLine(0, 1, {"text": "1"}, "")
            yield TextLine(1, 1, None, "bad")

    bad = Bad("f", 1, b"")
    skipped = writer(tmp_path, stop_at_invalid=False).make(bad)
    assert (skipped.num_documents, skipped.num_invalid) == (1, 1)
    stopped = writer(tmp_path).make(bad)
    assert (stopped.resumed, [entry.line for entry in stopped.invalid]) == (False, [1])
    assert list(tmp_path.glob("*.part-*")) == []


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """And the same command resumes from the finished shards."""
    source = write_json_lines(tmp_path / "in.jsonl", ["7 " * 400_000] * 12)
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(source), "--workers", "2"]
    command += ["--output-prefix", str(tmp_path / "c"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("c.parts/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid), "no worker is left"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.parts", "in.jsonl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100)
    assert "were done by an earlier run" in done.stdout
    assert done.stdout.splitlines()[2].split()[1:3] == ["12", str(12 * 400_000)]
    corpus = [f"c_text_document.{suffix}" for suffix in ("bin", "idx", "meta.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*corpus, "in.jsonl"]


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = [Path(f"/proc/{pid}/stat") for pid in os.listdir("/proc") if pid.isdigit()]
    fields = [stat.read_text().rsplit(")", 1)[1].split() for stat in states if stat.exists()]
    return any(int(field[2]) == group and field[0] != "Z" for field in fields)
