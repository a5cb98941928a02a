"""What the training side of the data costs: the index of a large corpus, a blend's order, and loading beside a step.

The corpus is synthetic and its `.bin` a sparse file, so that 10^9 tokens need no disk; what is measured of it is the
index. Each measurement of the index runs in a process of its own, whose peak memory is taken.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report

SEQ_LENGTH = 2048
PACKINGS = ("concatenate", "best-fit")


def write_sparse_corpus(prefix: Path, num_tokens: int, num_documents: int) -> None:
    """A corpus of random document lengths whose tokens are all 0 and take no room."""
    from megatron_slm.data.indexed import CODE_BY_DTYPE, HEADER, MAGIC, VERSION, bin_path, idx_path

    generator = np.random.default_rng(0)
    cuts = np.sort(generator.integers(0, num_tokens, size=num_documents - 1))
    lengths = np.diff(np.concatenate([[0], cuts, [num_tokens]])).astype(np.int32)
    dtype = np.dtype(np.uint16)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    with idx_path(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODE_BY_DTYPE[dtype], num_documents, num_documents + 1))
        for array in (lengths, pointers, np.arange(num_documents + 1, dtype=np.int64)):
            array.tofile(file)
    with bin_path(prefix).open("wb") as file:
        file.truncate(num_tokens * dtype.itemsize)


def measure_index(
    num_tokens: int = 10**9, num_documents: int = 10**6, *, epochs: float = 1.0, packing: str = "concatenate"
) -> dict[str, Any]:
    """Seconds and MiB from opening a corpus to its first sample, without a cache, with an empty one, and from it.

    Args:
        epochs: how often the run goes through the corpus.
        packing: see `--packing`.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        write_sparse_corpus(prefix, num_tokens, num_documents)
        num_samples = int(epochs * (num_tokens - 1) // SEQ_LENGTH)
        record: dict[str, Any] = {
            "tokens": num_tokens, "documents": num_documents, "samples": num_samples, "packing": packing,
        }  # fmt: skip
        for name, cache in (("in memory", None), ("cache made", f"{folder}/cache"), ("cache read", f"{folder}/cache")):
            record[name] = in_a_process(first_sample, str(prefix), num_samples, packing, cache)
    return record


def first_sample(prefix: str, num_samples: int, packing: str, cache: str | None) -> None:
    """Open a corpus and read one sample."""
    from megatron_slm.data.best_fit import BestFitSamples
    from megatron_slm.data.index_cache import IndexCache
    from megatron_slm.data.indexed import IndexedCorpus
    from megatron_slm.data.packing import PackedSamples

    corpus = IndexedCorpus(prefix)
    kind = BestFitSamples if packing == "best-fit" else PackedSamples
    samples = kind(
        corpus,
        0,
        corpus.num_sequences,
        sequence_length=SEQ_LENGTH,
        num_samples=num_samples,
        seed=1234,
        cache=IndexCache(Path(cache) if cache else None),
    )
    samples[len(samples) - 1]


def measure_blend(num_samples: int = 10**7, weights: tuple[float, ...] = (0.6, 0.3, 0.1)) -> dict[str, Any]:
    """Seconds and MiB of a blend's order."""
    return {"samples": num_samples, "weights": weights, **in_a_process(_draw, num_samples, weights)}


def _draw(num_samples: int, weights: tuple[float, ...]) -> None:
    from megatron_slm.data.interleave import greedy_choices

    greedy_choices(np.array(weights), num_samples)


def measure_loading(*, micro_batch_size: int = 4, num_documents: int = 20_000, seconds: float = 3.0) -> dict[str, Any]:
    """Milliseconds to read a micro-batch of real tokens by one thread, and tokens a second, for each packing."""
    from megatron_slm.data.best_fit import BestFitSamples
    from megatron_slm.data.indexed import IndexedCorpus
    from megatron_slm.data.indexed_writer import IndexedCorpusWriter
    from megatron_slm.data.loader import Boundaries, MicroBatchSource
    from megatron_slm.data.packing import PackedSamples

    record: dict[str, Any] = {"micro_batch_size": micro_batch_size, "seq_length": SEQ_LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        with IndexedCorpusWriter(Path(folder) / "corpus", np.uint16) as writer:
            for length in generator.geometric(1 / 600, size=num_documents):
                writer.add_document(generator.integers(0, 50_000, size=int(length)))
        corpus = IndexedCorpus(f"{folder}/corpus")
        for packing in PACKINGS:
            kind = BestFitSamples if packing == "best-fit" else PackedSamples
            samples = kind(corpus, 0, num_documents, sequence_length=SEQ_LENGTH, num_samples=None, seed=1)
            for apart in (False, True):
                source = MicroBatchSource(
                    samples,
                    micro_batch_size=micro_batch_size,
                    data_parallel_rank=0,
                    data_parallel_size=1,
                    vocab_size=50_000,
                    boundaries=Boundaries(eod_id=0, reset_attention_mask=apart, reset_position_ids=apart),
                )
                mean_seconds = _mean_seconds(source, len(samples) // micro_batch_size, seconds)
                record[f"{packing}, documents apart" if apart else packing] = {
                    "milliseconds": 1e3 * mean_seconds,
                    "tokens_per_second": micro_batch_size * SEQ_LENGTH / mean_seconds,
                }
    return record


def measure_share(*, step_seconds: float = 1.0, num_steps: int = 10, num_micro_batches: int = 16) -> dict[str, Any]:
    """Which share of a run's time is spent waiting for micro-batches of 4 x 2048 tokens.

    The step is a busy CPU, as a rank's Python thread is while it launches kernels: reading has to share it.
    """
    from megatron_slm.data.indexed import IndexedCorpus
    from megatron_slm.data.indexed_writer import IndexedCorpusWriter
    from megatron_slm.data.loader import MicroBatchSource
    from megatron_slm.data.packing import PackedSamples
    from megatron_slm.data.prefetch import Prefetcher

    num_samples, shares = num_steps * num_micro_batches * 4, {}
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        with IndexedCorpusWriter(Path(folder) / "corpus", np.uint16) as writer:
            for length in generator.geometric(1 / 600, size=5000):
                writer.add_document(generator.integers(0, 50_000, size=int(length)))
        corpus = IndexedCorpus(f"{folder}/corpus")
        order = {"sequence_length": SEQ_LENGTH, "num_samples": num_samples, "seed": 1}
        samples = PackedSamples(corpus, 0, corpus.num_sequences, **order)  # type: ignore[arg-type]
        for num_threads in (0, 2):
            source = MicroBatchSource(
                samples, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1, vocab_size=50_000
            )
            ahead = Prefetcher(
                source, num_micro_batches=num_micro_batches, num_samples=num_samples, num_threads=num_threads
            )
            ahead.prepare(0)
            waited, started = 0.0, time.perf_counter()
            for step in range(num_steps):
                began = time.perf_counter()
                ahead.prepare(step * num_micro_batches * 4)
                for micro_step in range(num_micro_batches):
                    ahead.micro_batch(step * num_micro_batches * 4, micro_step)
                waited += time.perf_counter() - began
                _compute(step_seconds)
            shares[f"{num_threads} threads"] = waited / (time.perf_counter() - started)
            ahead.close()
    return {"step_seconds": step_seconds, "num_micro_batches": num_micro_batches, "share_of_the_time": shares}


def _compute(seconds: float) -> None:
    matrix, until = np.ones((256, 256), dtype=np.float32), time.perf_counter() + seconds
    while time.perf_counter() < until:
        matrix @ matrix


def _mean_seconds(source: Any, num_micro_batches: int, seconds: float) -> float:
    source.micro_batch(0, 0)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        source.micro_batch(0, count % num_micro_batches)
        count += 1
    return (time.perf_counter() - started) / count


def in_a_process(function: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Wall seconds of a call, and how many MiB the process grew by, its imports not counted."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, function, arguments))
    process.start()
    record = receiver.recv()
    process.join()
    return record


def _report(sender: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import megatron_slm.data.best_fit
    import megatron_slm.data.loader  # noqa: F401

    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sender.send({"seconds": seconds, "mib": grown / 1024})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="an index of 10^7 tokens, short loading")


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    num_tokens, num_documents = (10**7, 10**4) if arguments.quick else (10**9, 10**6)
    indices = [measure_index(num_tokens, num_documents, packing=packing) for packing in PACKINGS]
    blends = [measure_blend(count) for count in ((10**5,) if arguments.quick else (10**7, 10**8))]
    loading = measure_loading(seconds=0.3 if arguments.quick else 3.0)
    share = measure_share(step_seconds=0.1 if arguments.quick else 1.0)
    markdown = _markdown(indices, blends, loading, share)
    records = [
        *({"name": "index", **record} for record in indices),
        *({"name": "blend", **record} for record in blends),
        {"name": "loading", **loading},
        {"name": "share", **share},
    ]
    report.write("data-loading", markdown, records, arguments.json)
    print(markdown)
    return 0


def _markdown(
    indices: list[dict[str, Any]], blends: list[dict[str, Any]], loading: dict[str, Any], share: dict[str, Any]
) -> str:
    states = ("in memory", "cache made", "cache read")
    rows = [
        [record["packing"], *(f"{record[state]['seconds']:.2f} s, {record[state]['mib']:,.0f} MiB" for state in states)]
        for record in indices
    ]
    tokens, documents = indices[0]["tokens"], indices[0]["documents"]
    out = [
        f"# Reading corpora\n\n{report.environment()}. Made by `python tools/benchmark.py data-loading`.\n\n"
        f"## From opening a corpus of {tokens:,} tokens in {documents:,} documents to its first sample\n\n",
        report.table(["packing", *states], rows),
        "\n## The order of a blend of three corpora\n\n",
        report.table(
            ["samples", "time", "memory"],
            [[f"{r['samples']:,}", f"{r['seconds']:.2f} s", f"{r['mib']:,.0f} MiB"] for r in blends],
        ),
        f"\n## A micro-batch of {loading['micro_batch_size']} x {loading['seq_length']} tokens, read by one thread\n\n",
        report.table(
            ["packing", "milliseconds", "million tokens a second"],
            [
                [name, f"{found['milliseconds']:.2f}", f"{found['tokens_per_second'] / 1e6:.1f}"]
                for name, found in loading.items()
                if isinstance(found, dict)
            ],
        ),
        f"\n## Waiting for {share['num_micro_batches']} of them beside a step of {share['step_seconds']} s\n\n",
        report.table(
            ["read ahead by", "share of the time"],
            [[name, f"{value:.2%}"] for name, value in share["share_of_the_time"].items()],
        ),
    ]
    return "".join(out)
