"""Whole runs of the training command: models to train, and what a run left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's shape."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    length: int

    def flags(self) -> dict[str, Any]:
        """As the training command's flags; the corpus has token ids, no text."""
        return {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "num-query-groups": self.groups,
            "tokenizer-type": "NullTokenizer",
            "vocab-size": self.vocabulary - 1,
            "make-vocab-size-divisible-by": 8,
            "seq-length": self.length,
        }


TINY = Shape(layers=4, hidden=64, ffn=96, heads=4, groups=2, vocabulary=512, length=64)


def write_corpus(prefix: Path, shape: Shape, *, samples: int) -> Path:
    """Text in which some tokens can be learned: runs of a fixed stride, with noise."""
    import numpy as np

    from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter

    draw, usable = np.random.default_rng(0), shape.vocabulary - 1
    with IndexedCorpusWriter(prefix, np.int32) as writer:
        for _ in range(samples):
            tokens = (draw.integers(usable) + draw.integers(1, 9) * np.arange(shape.length)) % usable
            noisy = draw.random(shape.length) < 0.3
            tokens[noisy] = draw.integers(0, usable, int(noisy.sum()))
            writer.add_document(np.append(tokens, usable))
    return prefix


def write_model(folder: Path, shape: Shape, *, device: str, seed: int) -> Path:
    """A random Llama in a Hugging Face folder, drawn on the device: 7B-shaped layers take a CPU minutes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
                max_position_embeddings=shape.length, dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            )
        )  # fmt: skip
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    return folder


def words(flags: Mapping[str, Any]) -> list[str]:
    """A command line; True gives the bare flag, None leaves one out."""
    found: list[str] = []
    for name, value in flags.items():
        if value is True:
            found.append(f"--{name}")
        elif value is not None:
            found += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return found


def command(flags: Mapping[str, Any], *, processes: int = 1, script: Path = TOOLS / "pretrain_slm.py") -> list[str]:
    """The training command on some GPUs of this machine, or as many CPU processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(script), *words(flags)]


def train(flags: Mapping[str, Any], *, processes: int = 1) -> list[dict[str, Any]]:
    """Run the training command, its output to this process's; the metrics of its steps.

    Raises:
        RuntimeError: it failed.
    """
    line = command(flags, processes=processes)
    print("+", *line, flush=True)
    done = subprocess.run(line, stdout=sys.stdout, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"training ended with exit code {done.returncode}")
    return steps(Path(flags["run-dir"]))


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics of a run's steps so far."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    return [line for line in map(json.loads, lines) if "event" not in line and "loss" in line]


def on_cpu() -> dict[str, str]:
    """The environment in which a process uses no GPU."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]
