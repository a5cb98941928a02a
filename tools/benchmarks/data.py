"""Preprocessing speed against Hugging Face's `encode_batch` and Megatron's way of sharing work, on the same text.

Text: Python sources that are installed here, as JSON lines, every file once but those above a megabyte (a document is
one worker's, and of so little text it would be a tenth). For the fast tokenizer with several workers, the same several
times: starting a worker takes it as long as some tens of megabytes. Tokenizers: a byte-level BPE and a SentencePiece
BPE trained on a part of it. Every contender runs in a process of its own, all in turn, round after round; a rate is
megabytes of JSON lines a second of CPU time of the process and its children (so a rate per core), the best of the
rounds. Tokenizers are loaded before the clock starts; workers are started after it. All corpora are compared byte by
byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import report

KINDS = {"byte-level BPE": ("HuggingFaceTokenizer", "hf"), "SentencePiece BPE": ("SentencePieceTokenizer", "sp.model")}
BATCH, MEGATRON = "Hugging Face encode_batch, ids only", "Megatron's pattern"
OURS, FAST = "ours", "ours, --fast-tokenizer"
HALVES = "ours, two separate runs, each on its half"
"""Shares nothing but the machine: how much two cores give more than one, whatever a program does."""
CONTENDERS = [(BATCH, 1), (MEGATRON, 1), (MEGATRON, 2), (OURS, 1), (OURS, 2), (FAST, 1), (FAST, 2)]
VOCAB_SIZE = {"byte-level BPE": 32000, "SentencePiece BPE": 8000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="2 MB, one round")
    parser.add_argument("--megabytes", type=float, default=48.0, help="text for all contenders (default 48)")
    parser.add_argument("--large-megabytes", type=float, default=192.0, help="text for ours alone (default 192)")
    parser.add_argument("--repeats", type=int, default=8, help="as often that text for the fast tokenizer (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing (default 3)")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    megabytes, rounds = (2.0, 1) if arguments.quick else (arguments.megabytes, arguments.rounds)
    large_megabytes, repeats = (4.0, 2) if arguments.quick else (arguments.large_megabytes, arguments.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = _write_texts(folder, megabytes * 1e6, large_megabytes * 1e6, repeats)
        _train(folder, arguments.quick)
        records: list[dict[str, Any]] = []
        markdown = ""
        for kind in KINDS:
            jobs = [(who, workers, "text") for who, workers in CONTENDERS]
            jobs += [(OURS, 1, "large"), (OURS, 2, "large"), (HALVES, 2, "large")]
            jobs += [(FAST, 1, "repeated"), (FAST, 2, "repeated")]
            timed = _timed(folder, kind, jobs, rounds)
            records += _records(kind, timed, sizes)
            markdown = _markdown(records, rounds)
            report.write("data", markdown, records, arguments.json)  # now: the whole takes a while
    print(markdown)
    return 0


def _write_texts(folder: Path, num_bytes: float, num_large_bytes: float, repeats: int) -> dict[str, int]:
    """text.jsonl, large.jsonl which goes on where it ends, and repeated.jsonl, the latter several times."""
    sources = _sources()
    sizes = {}
    for name, wanted in (("text", num_bytes), ("large", num_large_bytes)):
        path, size = folder / f"{name}.jsonl", 0
        with path.open("wb") as file:
            while size < wanted and (text := next(sources, None)) is not None:
                size += file.write(json.dumps({"text": text}).encode() + b"\n")
        sizes[name] = size
    large = (folder / "large.jsonl").read_bytes()
    with (folder / "repeated.jsonl").open("wb") as file:
        for _ in range(repeats):
            file.write(large)
    return {**sizes, "repeated": repeats * len(large)}


def _sources() -> Iterator[str]:
    seen = set()
    for folder in (Path(os.__file__).parent, Path(json.__file__).parent, *map(Path, sys.path)):
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else []:
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen or not 200 <= len(content) < 1_000_000:
                continue
            seen.add(digest)
            yield content.decode("utf-8", "replace")


def _train(folder: Path, quick: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from megatron_slm.data.tokenizers.training import train_sentencepiece

    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    size = 2000 if quick else VOCAB_SIZE["byte-level BPE"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts[: len(texts) // 2], trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    fast.save_pretrained(str(folder / "hf"))
    size = 1000 if quick else VOCAB_SIZE["SentencePiece BPE"]
    (folder / "sp.model").write_bytes(train_sentencepiece(texts[: len(texts) // 10], vocab_size=size))


def _timed(
    folder: Path, kind: str, jobs: list[tuple[str, int, str]], rounds: int
) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """What every round of every job took; all corpora of one text must be the same."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for who, workers, text in jobs:
            if who == BATCH and KINDS[kind][0] != "HuggingFaceTokenizer":
                continue
            job = {"who": who, "workers": workers, "text": text, "kind": kind, "folder": str(folder)}
            found.setdefault((who, workers, text), []).append(_spawn(job))
            sys.stderr.write(f"{kind}, {who}, {workers} workers, {text}: round {number + 1} of {rounds}\n")
    for text in ("text", "large", "repeated"):
        hashes = {r["sha256"] for job, results in found.items() if job[2] == text for r in results if r["sha256"]}
        if len(hashes) != 1:
            raise RuntimeError(f"{kind}: the corpora of {text} differ")
    return found


def _spawn(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "benchmark.py"), "data", "--child"]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run([*command, json.dumps(job)], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# ---- in a process of its own ------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> dict[str, Any]:
    from megatron_slm.data.tokenizers.registry import build_tokenizer

    folder = Path(job["folder"])
    kind, model = KINDS[job["kind"]]
    tokenizer = build_tokenizer(kind, folder / model)
    tokenizer.encode("warm")
    source = folder / f"{job['text']}.jsonl"
    work = {BATCH: _encode_batch, MEGATRON: _megatron, HALVES: _halves}.get(job["who"], _ours)
    if work is _halves:
        _cut_in_two(source)
    started, cpu = time.perf_counter(), _cpu_seconds()
    prefix = work(tokenizer, source, folder / f"out-{os.getpid()}", job)
    result = {"wall": time.perf_counter() - started, "cpu": _cpu_seconds() - cpu, "sha256": None}
    if prefix is not None:
        digest = hashlib.sha256()
        for suffix in ("bin", "idx"):
            path = Path(f"{prefix}.{suffix}")
            digest.update(path.read_bytes())
            path.unlink()
        result["sha256"] = digest.hexdigest()
    return result


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _encode_batch(tokenizer: Any, source: Path, prefix: Path, job: dict[str, Any]) -> None:
    """The least that anyone could do: texts in memory, batches of 1,000, ids thrown away."""
    texts = [json.loads(line)["text"] for line in source.open()]
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer._backend.encode_batch(texts[start : start + 1000], add_special_tokens=False):
            _ = encoding.ids


_TOKENIZER: list[Any] = []


def _start(tokenizer: Any) -> None:
    _TOKENIZER[:] = [tokenizer]


def _encode_line(line: str) -> tuple[list[int], list[int], int]:
    ids = [*_TOKENIZER[0].encode(json.loads(line)["text"]), _TOKENIZER[0].eod_id]
    return ids, [len(ids)], len(line)


def _megatron(tokenizer: Any, source: Path, prefix: Path, job: dict[str, Any]) -> Path:
    """tools/preprocess_data.py of Megatron-LM: a pool takes lines, lists of ids come back, one process writes."""
    import multiprocessing

    import numpy as np

    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

    with (
        multiprocessing.Pool(job["workers"], initializer=_start, initargs=(tokenizer,)) as pool,
        source.open(encoding="utf-8") as lines,
        IndexedCorpusWriter(prefix, np.uint16) as writer,
    ):
        for ids, _, _ in pool.imap(_encode_line, lines, 32):
            writer.add_document(ids)
        pool.close()
        pool.join()
    return prefix


def _ours(tokenizer: Any, source: Path, prefix: Path, job: dict[str, Any]) -> Path:
    from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess

    config = PreprocessConfig(
        input=(str(source),),
        output_prefix=str(prefix),
        append_eod=True,
        workers=job["workers"],
        fast_tokenizer=job["who"] == FAST,
    )
    done = preprocess(config, tokenizer)
    if (done.encoder == "gigatoken") != config.fast_tokenizer:
        raise RuntimeError(f"encoded with {done.encoder}")
    return Path(config.corpus_prefix("text"))


def _halves(tokenizer: Any, source: Path, prefix: Path, job: dict[str, Any]) -> None:
    """One worker on each half of the text, in two processes that know nothing of each other."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    alone = {**job, "workers": 1}
    runs = [
        context.Process(target=_ours, args=(tokenizer, half, Path(f"{prefix}-{half.stem}"), alone))
        for half in _half_paths(source)
    ]
    for run_ in runs:
        run_.start()
    for run_ in runs:
        run_.join()
    if any(run_.exitcode for run_ in runs):
        raise RuntimeError("one of two separate runs failed")


def _half_paths(source: Path) -> list[Path]:
    return [source.with_name(f"half-{number}.jsonl") for number in (1, 2)]


def _cut_in_two(source: Path) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    total, done, first = sum(map(len, lines)), 0, 0
    while done < total / 2:
        done, first = done + len(lines[first]), first + 1
    for path, half in zip(_half_paths(source), (lines[:first], lines[first:]), strict=True):
        path.write_bytes(b"".join(half))


# ---- the report -------------------------------------------------------------------------------------------


def _records(
    kind: str, timed: dict[tuple[str, int, str], list[dict[str, Any]]], sizes: dict[str, int]
) -> list[dict[str, Any]]:
    records = []
    for (who, workers, text), results in timed.items():
        megabytes = sizes[text] / 1e6
        records.append(
            {
                "tokenizer": kind,
                "name": who,
                "workers": workers,
                "megabytes": round(megabytes, 1),
                "mb_per_cpu_second": round(megabytes / min(result["cpu"] for result in results), 2),
                "mb_per_second": round(megabytes / min(result["wall"] for result in results), 2),
            }
        )
    return records


def _markdown(records: list[dict[str, Any]], rounds: int) -> str:
    out = [
        "# Preprocessing\n\n"
        "JSON lines to `.bin/.idx` corpora; rates in megabytes of JSON lines a second, higher is better. Made by "
        f"`python tools/benchmark.py data`: {report.environment()}, {rounds} rounds in turn, the best of each. All "
        "corpora of one text were the same bytes. A rate per core counts the CPU time of all processes of a contender; "
        "`×` is it divided by the first row's. Ours are measured on more text too, because starting workers counts. "
        "Two separate runs are what two cores of this machine give at most; the last column divides them by one worker "
        "too.\n"
    ]
    for kind in dict.fromkeys(record["tokenizer"] for record in records):
        mine = [record for record in records if record["tokenizer"] == kind]
        rows = []
        for record in mine:
            ratio = record["mb_per_cpu_second"] / mine[0]["mb_per_cpu_second"]
            name = OURS if record["name"] == HALVES else record["name"]
            alone = next(r for r in mine if r["name"] == name and r["megabytes"] == record["megabytes"])
            speedup = f"{record['mb_per_second'] / alone['mb_per_second']:.2f}" if record["workers"] == 2 else ""
            numbers = [f"{record['mb_per_cpu_second']:.2f}", f"{ratio:.2f}", f"{record['mb_per_second']:.2f}", speedup]
            rows.append([record["name"], str(record["workers"]), f"{record['megabytes']:.0f}", *numbers])
        header = ["", "workers", "MB", "MB/s per core", "×", "MB/s on the clock", "two workers ÷ one"]
        out += [f"\n## {kind}\n\n", report.table(header, rows)]
    return "".join(out)
