"""Evaluation of one model: perplexity on named sets and accuracy on tasks, with confidence intervals."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_slm.analysis.excerpt import Excerpt, excerpt_of_corpus, excerpt_of_texts, load_tokenizer
from megatron_slm.analysis.losses import model_statistics
from megatron_slm.convert.export import export_checkpoint
from megatron_slm.convert.hf_config import is_hf_folder
from megatron_slm.convert.source import Model
from megatron_slm.data.corpus.indexed import bin_path
from megatron_slm.errors import ConfigError
from megatron_slm.evaluation.answers import Rules, equal, extract
from megatron_slm.evaluation.generation import Generator
from megatron_slm.evaluation.prompts import STOPS, Prompt, prompt_named
from megatron_slm.evaluation.statistics import bootstrap, share
from megatron_slm.evaluation.tasks import Task
from megatron_slm.hub import local_path


@contextmanager
def hugging_face_folder(path: str) -> Iterator[str]:
    """Yield a model as a Hugging Face folder: the folder itself, or a temporary export of a checkpoint.

    Raises:
        CheckpointError, WeightsError: the path is neither.
    """
    here = local_path(path, field="--model")
    if is_hf_folder(here):
        yield str(here)
        return
    with tempfile.TemporaryDirectory(prefix="megatron_slm_") as folder:
        inside = here / "checkpoints"
        load = str(inside if inside.is_dir() else here)
        yield str(export_checkpoint(load, f"{folder}/hf", verifies=False).folder)


# ---- perplexity ---------------------------------------------------------------------------------------------


def named_sets(texts: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=FILE` or `NAME=PREFIX` (a Megatron corpus) into paths by name.

    Raises:
        ConfigError: a name is missing or used twice.
    """
    sets: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path or name in sets:
            raise ConfigError("--perplexity", text, "be NAME=FILE or NAME=PREFIX, each name once", "name the set")
        sets[name] = path
    return sets


def perplexity(
    model: Model, path: str, *, tokenizer_model: str | None, sequence_length: int | None, max_tokens: int
) -> dict[str, Any]:
    """Compute loss in nats per token, perplexity and (for texts) bits per byte of one set, span by span.

    The bootstrap interval draws whole spans, since the tokens of one text are not independent.
    """
    length = sequence_length or min(model.architecture.max_position_embeddings, 2048)
    is_corpus = bin_path(path).is_file()
    tokenizer = None if is_corpus else load_tokenizer(model, tokenizer_model)
    excerpt = (
        excerpt_of_corpus(path, None, sequence_length=length, max_tokens=max_tokens)
        if is_corpus
        else excerpt_of_texts([path], tokenizer, sequence_length=length, max_tokens=max_tokens)
    )
    loss_Ws = model_statistics(model, excerpt).loss_Ws
    loss_W, tokens_W = loss_Ws.sum(axis=1, dtype=np.float64), excerpt.valid_Ws.sum(axis=1).astype(np.float64)
    interval = bootstrap(loss_W, tokens_W, resamples=2_000)
    return {
        "loss": interval.mean,
        "loss_interval": [interval.low, interval.high],
        "perplexity": math.exp(min(interval.mean, 700.0)),
        "bits_per_byte": None if is_corpus else float(loss_W.sum()) / math.log(2) / max(1, _num_bytes(excerpt)),
        "tokens": excerpt.num_tokens,
        "windows": len(excerpt.spans),
    }


def _num_bytes(excerpt: Excerpt) -> int:
    """Count the bytes of the predicted tokens."""
    return sum(len("".join(span.token_texts[1:]).encode()) for span in excerpt.spans if span.token_texts)


# ---- tasks --------------------------------------------------------------------------------------------------


def evaluate_task(
    generator: Generator,
    task: Task,
    *,
    prompt: Prompt | None = None,
    num_shots: int | None = None,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    rules: Rules = "strict",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question with a few-shot prompt and greedy decoding.

    Args:
        prompt: replaces the task's own prompt.
        num_shots: number of the prompt's shots to use; None for all.

    Returns:
        The accuracy with its interval, and the numbers of unreadable answers and of texts that were cut off at
        `max_new_tokens`; and one record per question.
    """
    prompt = prompt or prompt_named(task.prompt)
    if num_shots is not None:
        prompt = prompt.with_shots(num_shots)
    special = generator.tokenizer.eos_token
    texts = generator.write(
        [prompt.ask(question.text) for question in task.questions],
        max_new_tokens=max_new_tokens,
        stops=[*STOPS, *([special] if special else [])],
        batch_size=batch_size,
        progress=progress,
    )
    records: list[dict[str, Any]] = []
    for number, (question, written) in enumerate(zip(task.questions, texts, strict=True), 1):
        answer = extract(written.text, question.kind, is_complete=written.is_complete)
        records.append(
            {
                "number": number,
                "question": question.text,
                "truth": question.answer,
                "written": written.text,
                "cut_off": not written.is_complete,
                "answer": answer,
                "correct": equal(answer, question.answer, question.kind, rules=rules),
            }
        )
    num_correct = sum(record["correct"] for record in records)
    interval = share(num_correct, len(records))
    unread = [record["number"] for record in records if record["answer"] is None]
    summary = {
        "accuracy": interval.mean,
        "interval": [interval.low, interval.high],
        "questions": len(records),
        "correct": num_correct,
        "unread": len(unread),
        "cut_off": sum(record["cut_off"] for record in records),
        "unread_questions": unread,
        "shots": len(prompt.shots),
        "rules": rules,
    }
    return summary, records
