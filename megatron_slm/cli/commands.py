"""The console scripts `slm-...` (see `[project.scripts]`), which the files in tools/ call too."""

from __future__ import annotations

import os
from typing import NoReturn

from megatron_slm.cli.command import execute


def pretrain() -> NoReturn:
    """Train a model, selectively or plainly."""
    execute("pretrain", is_rank=True)


def score() -> NoReturn:
    """Store a reference's per-token losses for the samples of a run."""
    execute("score", is_rank=True)


def preflight() -> NoReturn:
    """Check the machines of a run."""
    execute("preflight", is_rank=True)


def supervise() -> NoReturn:
    """Start a training and restart it when it fails."""
    execute("supervise")


def replay() -> NoReturn:
    """Run the bad batches of a run again, without training."""
    execute("replay", is_rank=True)


def plan() -> NoReturn:
    """Plan memory, step time and layout of a run."""
    execute("plan")


def preprocess() -> NoReturn:
    """Tokenize text into Megatron corpora."""
    # A worker is one core: no threads of tokenizers, nor of NumPy, whose idle ones make malloc slower too.
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    execute("preprocess")


def merge_corpora() -> NoReturn:
    """Concatenate corpora."""
    execute("merge_corpora")


def inspect_data() -> NoReturn:
    """Print corpora and the samples a run makes of them."""
    execute("inspect_data")


def train_tokenizer() -> NoReturn:
    """Train a SentencePiece tokenizer."""
    execute("train_tokenizer")


def convert() -> NoReturn:
    """Import, export, verify and inspect Hugging Face folders."""
    execute("convert")


def checkpoint() -> NoReturn:
    """List and verify checkpoints."""
    execute("checkpoint")


def report() -> NoReturn:
    """Compare runs in a page."""
    execute("report")


def analyze() -> NoReturn:
    """Show which tokens are kept and how they are learned."""
    execute("analyze_tokens")


def evaluate() -> NoReturn:
    """Measure perplexity and few-shot accuracy of a model."""
    execute("evaluate")
