"""Small corpora, models and runs for the tests of whole runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

VOCAB_SIZE = 97
SEQ_LENGTH = 16
MODEL_FLAGS = {
    "num-layers": 4,
    "hidden-size": 32,
    "ffn-hidden-size": 48,
    "num-attention-heads": 4,
    "num-query-groups": 2,
}


def zero_config(stage: int) -> str:
    """The shipped DeepSpeed JSON of a ZeRO stage; precision follows --bf16."""
    return f"ds_configs/zero{stage}_bf16{'_pipeline' * (stage == 1)}.json"


def write_corpus(prefix: Path, *, seed: int = 0, num_documents: int = 40, vocab_size: int = VOCAB_SIZE) -> Path:
    """A corpus of short documents with some structure in it; the last id ends a document."""
    generator = np.random.default_rng(seed)
    with IndexedCorpusWriter(prefix, np.uint16) as writer:
        for _ in range(num_documents):
            length = int(generator.integers(3, 60))
            start, stride = generator.integers(0, vocab_size - 1, 2)
            tokens = (start + stride * np.arange(length)) % (vocab_size - 1)
            noisy = generator.random(length) < 0.3
            tokens[noisy] = generator.integers(0, vocab_size - 1, int(noisy.sum()))
            writer.add_document(np.append(tokens, vocab_size - 1))
    return prefix


def save_hf_llama(folder: Path, *, seed: int = 0, vocab_size: int = VOCAB_SIZE, **options: Any) -> Path:
    """A random Llama as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            **options,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def flags(values: dict[str, Any]) -> list[str]:
    """A command line from a mapping; True gives the bare flag."""
    out: list[str] = []
    for name, value in values.items():
        out.append(f"--{name}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            out += [str(item) for item in value]
        elif value is not True:
            out.append(str(value))
    return out


MEASURED = (
    "step_time_seconds",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
    "mfu_with_reference",
    "timers_ms",
    "ranks",
    "memory_allocated_mib",
    "memory_peak_mib",
    "memory_host_mib",
    "memory_host_peak_mib",
)
"""Metrics that differ between two runs of the same losses."""


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what differs between two runs of the same losses."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def run_flags(corpus: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Flags of a small run; `changes` by flag name with underscores, None leaves one out."""
    values: dict[str, Any] = {
        **MODEL_FLAGS,
        "data-path": corpus,
        "run-dir": run_dir,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB_SIZE - 1,
        "make-vocab-size-divisible-by": 8,
        "seq-length": SEQ_LENGTH,
        "train-iters": 5,
        "micro-batch-size": 2,
        "global-batch-size": 8,
        "lr": 1e-2,
        "clip-grad": 0.5,
        "init-method-std": 0.2,
        "objective": "clm",
    }
    values.update({name.replace("_", "-"): value for name, value in changes.items()})
    return {name: value for name, value in values.items() if value is not None}
