"""What the training side of the data costs: the index of a large corpus, a blend's order, and loading beside a step.

The corpus is synthetic and its `.bin` a sparse file, so that 10^9 tokens need no disk; what is measured of it is the
index. Each measurement of the index runs in a process of its own, whose peak memory and CPU time are taken: others on
the machine do not count, and neither does waiting for the disk. Waiting within a run is measured on the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report, world

SEQ_LENGTH = 2048
PACKINGS = ("concatenate", "best-fit")
SHARE_VOCAB_SIZE, SHARE_MICRO_BATCHES, WARM_UP_STEPS = 8192, 4, 1


def write_sparse_corpus(prefix: Path, num_tokens: int, num_documents: int) -> None:
    """A corpus of random document lengths whose tokens are all 0 and take no room."""
    from megatron_slm.data.corpus.indexed import CODE_BY_DTYPE, HEADER, MAGIC, VERSION, bin_path, idx_path

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
    from megatron_slm.data.corpus.indexed import IndexedCorpus
    from megatron_slm.data.index_cache import IndexCache
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
    """Seconds and MiB of a blend's order, which goes to the cache of indices."""
    with tempfile.TemporaryDirectory() as folder:
        found = in_a_process(_draw, num_samples, weights, folder)
    return {"samples": num_samples, "corpora": len(weights), **found}


def uneven_weights(num_corpora: int) -> tuple[float, ...]:
    """Weights between 0.01 and 1.01, no two alike, divided by their sum."""
    from megatron_slm.data.interleave import normalized

    return normalized((np.random.default_rng(0).random(num_corpora) + 0.01).tolist())


def _draw(num_samples: int, weights: tuple[float, ...], folder: str) -> None:
    from megatron_slm.data.index_cache import IndexCache
    from megatron_slm.data.interleave import Interleave

    Interleave(weights, num_samples, IndexCache(Path(folder))).drawn(num_samples)


def measure_loading(*, micro_batch_size: int = 4, num_documents: int = 20_000, seconds: float = 3.0) -> dict[str, Any]:
    """Milliseconds to read a micro-batch of real tokens by one thread, and tokens a second, for each packing."""
    from megatron_slm.data.best_fit import BestFitSamples
    from megatron_slm.data.corpus.indexed import IndexedCorpus
    from megatron_slm.data.loader import Boundaries, MicroBatchSource
    from megatron_slm.data.packing import PackedSamples

    record: dict[str, Any] = {"micro_batch_size": micro_batch_size, "seq_length": SEQ_LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        _write_random_corpus(Path(folder) / "corpus", num_documents=num_documents, vocab_size=50_000)
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


def measure_share(*, num_steps: int = 8, seq_length: int = SEQ_LENGTH) -> dict[str, Any]:
    """Which share of a real run's time is spent waiting for micro-batches, with and without reading ahead.

    The run is a small Llama in one process of one thread, trained as `tools/pretrain_slm.py` trains it; everything that
    asks for micro-batches is timed. The first step, which warms up, is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_random_corpus(Path(folder) / "corpus", num_documents=2000, vocab_size=SHARE_VOCAB_SIZE)
        shares = {}
        for num_threads in (0, 2):
            job = {"folder": folder, "num_threads": num_threads, "num_steps": num_steps, "seq_length": seq_length}
            shares[f"{num_threads} threads"] = world.run("data-loading", job, num_ranks=1)[0]
    return {"micro_batches": SHARE_MICRO_BATCHES, "seq_length": seq_length, "runs": shares}


def _child(job: dict[str, Any]) -> list[dict[str, Any]]:
    """In a process of its own: train, and say how long steps were and how much of it was waiting."""
    import torch

    torch.set_num_threads(1)
    from megatron_slm.data.prefetch import Prefetcher
    from megatron_slm.flags.load import parse
    from megatron_slm.training.pretrain import pretrain

    moments: list[float] = []
    waited = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                waited[0] += time.perf_counter() - began
                if method.__name__ == "prepare":  # once a step, behind it
                    moments.append(time.perf_counter())
                    if len(moments) <= WARM_UP_STEPS + 1:
                        waited[0] = 0.0

        return call

    for name in ("prepare", "micro_batch"):
        setattr(Prefetcher, name, timed(getattr(Prefetcher, name)))
    values = {
        "num-layers": 2,
        "hidden-size": 128,
        "ffn-hidden-size": 256,
        "num-attention-heads": 4,
        "data-path": f"{job['folder']}/corpus",
        "run-dir": f"{job['folder']}/run-{job['num_threads']}",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": SHARE_VOCAB_SIZE - 1,
        "objective": "clm",
        "seq-length": job["seq_length"],
        "micro-batch-size": 1,
        "global-batch-size": SHARE_MICRO_BATCHES,
        "train-iters": job["num_steps"] + WARM_UP_STEPS,
        "num-workers": job["num_threads"],
    }
    pretrain(parse([word for name, value in values.items() for word in (f"--{name}", str(value))])[0])
    seconds = moments[-1] - moments[WARM_UP_STEPS]
    tokens = job["num_steps"] * SHARE_MICRO_BATCHES * job["seq_length"]
    return [
        {
            "share_of_the_time": waited[0] / seconds,
            "step_seconds": seconds / job["num_steps"],
            "tokens_per_second": tokens / seconds,
        }
    ]


def _write_random_corpus(prefix: Path, *, num_documents: int, vocab_size: int) -> None:
    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

    generator = np.random.default_rng(0)
    with IndexedCorpusWriter(prefix, np.uint16) as writer:
        for length in generator.geometric(1 / 600, size=num_documents):
            writer.add_document(generator.integers(0, vocab_size, size=int(length)))


def _mean_seconds(source: Any, num_micro_batches: int, seconds: float) -> float:
    source.micro_batch(0, 0)
    started, count = time.process_time(), 0
    while time.process_time() - started < seconds:
        source.micro_batch(0, count % num_micro_batches)
        count += 1
    return (time.process_time() - started) / count


def in_a_process(function: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """CPU seconds of a call, and how many MiB the process grew by, its imports not counted."""
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

    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    function(*arguments)
    seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sender.send({"seconds": seconds, "mib": grown / 1024})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", metavar="FILE", help="write the records there instead of docs/benchmarks/")
    parser.add_argument("--quick", action="store_true", help="an index of 10^7 tokens, short loading")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the report."""
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    load = os.getloadavg()[0]
    num_tokens, num_documents = (10**7, 10**4) if arguments.quick else (10**9, 10**6)
    indices = [measure_index(num_tokens, num_documents, packing=packing) for packing in PACKINGS]
    blends = [measure_blend(count) for count in ((10**5,) if arguments.quick else (10**7, 10**8))]
    blends.append(measure_blend(10**5 if arguments.quick else 10**8, uneven_weights(1000)))
    loading = measure_loading(seconds=0.3 if arguments.quick else 3.0)
    share = measure_share(num_steps=2, seq_length=64) if arguments.quick else measure_share()
    markdown = _markdown(indices, blends, loading, share, load)
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
    indices: list[dict[str, Any]],
    blends: list[dict[str, Any]],
    loading: dict[str, Any],
    share: dict[str, Any],
    load: float,
) -> str:
    states = ("in memory", "cache made", "cache read")
    rows = [
        [record["packing"], *(f"{record[state]['seconds']:.2f} s, {record[state]['mib']:,.0f} MiB" for state in states)]
        for record in indices
    ]
    tokens, documents = indices[0]["tokens"], indices[0]["documents"]
    out = [
        f"# Reading corpora\n\n{report.environment()}. Made by `python tools/benchmark.py data-loading`, with "
        f"{load:.1f} processes running on average when it began. Times are CPU seconds of one thread but for the last "
        "table.\n\n"
        f"## From opening a corpus of {tokens:,} tokens in {documents:,} documents to its first sample\n\n",
        report.table(["packing", *states], rows),
        "\n## The order of a blend, written to the cache\n\n",
        report.table(
            ["corpora", "samples", "time", "memory"],
            [
                [f"{r['corpora']:,}", f"{r['samples']:,}", f"{r['seconds']:.2f} s", f"{r['mib']:,.0f} MiB"]
                for r in blends
            ],
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
        f"\n## Waiting for micro-batches within a run\n\nA real training of a small Llama (2 layers of width 128) in "
        f"one process, on the clock: {share['micro_batches']} micro-batches of 1 x {share['seq_length']} tokens a "
        "step.\n\n",
        report.table(
            ["read ahead by", "share of the time", "a step", "tokens a second"],
            [
                [
                    name,
                    f"{found['share_of_the_time']:.3%}",
                    f"{found['step_seconds']:.2f} s",
                    f"{found['tokens_per_second']:,.0f}",
                ]
                for name, found in share["runs"].items()
            ],
        ),
    ]
    return "".join(out)
