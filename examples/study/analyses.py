"""Analyses of every finished run: kept tokens, answers, losses over its checkpoints, token dynamics."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from results import CLEAN

from megatron_slm.analysis.excerpt import excerpt_of_corpus, excerpt_of_texts, load_tokenizer
from megatron_slm.analysis.kept import select
from megatron_slm.analysis.losses import checkpoints_in, model_statistics, open_comparable
from megatron_slm.cli.analyze_tokens import main as analyze_tokens
from megatron_slm.cli.evaluate import main as evaluate
from megatron_slm.files import write_durably
from megatron_slm.selection.scores import score_named

if TYPE_CHECKING:
    from study import Planned

SEQUENCE_LENGTH, SPANS_PER_MICRO_BATCH = 128, 16
"""Sequence length and micro-batch size of the training runs."""


def analyze(out: Path, runs: Sequence[Planned]) -> None:
    """Analyze every finished run, skipping analyses with results."""
    questions, prompt = out / "arithmetic.jsonl", out / "prompt.txt"
    _write_questions(out / "text" / "curated_heldout.jsonl", questions)
    prompt.write_text("Question: {question}\n")
    text = out / "text" / "noisy_heldout.jsonl"
    for run in runs:
        folder = run.folder
        if not run.is_finished or run.name == "base":
            continue
        print(f"-- seed {run.seed}: {run.name}", flush=True)
        if not (folder / "selection.json").exists():
            newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
            selection = run.selection
            if "--reference-load" not in selection:
                selection = (*selection, "--reference-load", folder.parent / "reference" / "checkpoints")
            _call(
                analyze_tokens, "selection", "--load", newest, *selection, "--text-file", text,
                "--micro-batch-size", SPANS_PER_MICRO_BATCH, "--output", folder / "selection.html",
            )  # fmt: skip
        if run.answers and not (folder / "answers.json").exists():
            _call(
                evaluate, "--model", folder, "--task", f"arithmetic:gsm8k={questions}", "--prompt-file", prompt,
                "--max-new-tokens", 90, "--batch-size", 100, "--output", folder / "answers.json",
            )  # fmt: skip
        if run.followed and not (folder / "followed.json").exists():
            write_durably(folder / "followed.json", (json.dumps(follow(folder, text)) + "\n").encode())
        look_inside(out, run)
        if run.name == "clm" and not (folder / "dynamics.json").exists():
            page = folder / "dynamics.html"
            _call(analyze_tokens, "dynamics", "--load", folder, "--text-file", text, "--output", page)


def look_inside(out: Path, run: Planned) -> None:
    """Write the target loss inside problems, and at their ends, into a finished run's folder."""
    path = run.folder / "inside.json"
    if run.is_finished and run.name != "base" and not path.exists():
        write_durably(path, (json.dumps(inside(out, run.folder)) + "\n").encode())


def inside(out: Path, run: Path) -> dict[str, list[float]]:
    """Return the target loss over a run's checkpoints, separately at the ends of problems and inside them.

    An end is the end-of-document token and the token after it. Both are predictable in curated text and neither is in
    noisy pages, so a model that imitates the reference's format gains there without getting better at arithmetic.
    """
    checkpoints = [checkpoints_in([str(run.parent / "base")])[-1], *checkpoints_in([str(run)])]
    first = open_comparable(checkpoints[0], None)
    tokenizer = load_tokenizer(first, None)
    corpus = str(out / "corpora" / "curated_heldout_text_document")
    excerpt = excerpt_of_corpus(corpus, tokenizer, sequence_length=SEQUENCE_LENGTH, max_tokens=1 << 62)
    end_Ws1 = excerpt.tokens_Ws1 == tokenizer.eos_token_id
    ends_N = (end_Ws1[:, 1:] | end_Ws1[:, :-1])[excerpt.valid_Ws]
    out_of: dict[str, list[float]] = {"steps": [], "ends": [], "inside": [], "ends_share": [float(ends_N.mean())]}
    for checkpoint in checkpoints:
        loss_N = model_statistics(open_comparable(checkpoint, first), excerpt).loss_Ws[excerpt.valid_Ws].astype(float)
        out_of["steps"].append(0 if checkpoint is checkpoints[0] else checkpoint.step or 0)
        out_of["ends"].append(float(loss_N[ends_N].mean()))
        out_of["inside"].append(float(loss_N[~ends_N].mean()))
    return out_of


def _call(command: Any, *words: object) -> None:
    if command([str(word) for word in words]):
        raise SystemExit(f"{' '.join(map(str, words))} failed")


def _write_questions(problems: Path, path: Path) -> None:
    with path.open("w") as file:
        for text in (json.loads(line)["text"] for line in problems.read_text().splitlines()):
            question = text.split("\n")[0].removeprefix("Question: ")
            answer = re.search(r"^Answer: (\d+)$", text, flags=re.MULTILINE)
            assert answer is not None, "every problem ends in its answer"
            file.write(json.dumps({"question": question, "answer": answer[1]}) + "\n")


def follow(run: Path, text: Path, *, keep_ratio: float = 0.6) -> dict[str, list[float]]:
    """Return losses of kept and other tokens over a run's checkpoints, from the base model on (the paper's figure 6).

    The kept tokens are those of held-out pages that the base model would keep with the reference, the same for every
    run of a seed. Also returns precision and recall, against the clean tokens, of each checkpoint's own selection.
    """
    checkpoints = [checkpoints_in([str(run.parent / "base")])[-1], *checkpoints_in([str(run)])]
    first = open_comparable(checkpoints[0], None)
    tokenizer = load_tokenizer(first, None)
    excerpt = excerpt_of_texts([str(text)], tokenizer, sequence_length=SEQUENCE_LENGTH, max_tokens=1 << 62)
    clean_N = np.array([kind == CLEAN for span in excerpt.spans for kind in span.kinds[1:]])
    reference = model_statistics(open_comparable(checkpoints_in([str(run.parent / "reference")])[-1], first), excerpt)
    out: dict[str, list[float]] = {"steps": [], "kept": [], "other": [], "precision": [], "recall": []}
    fixed_N = None
    for checkpoint in checkpoints:
        statistics = model_statistics(open_comparable(checkpoint, first), excerpt)
        chosen = select(
            checkpoint.label, excerpt, statistics, reference, score=score_named("excess"), keep_ratio=keep_ratio,
            scope="micro-batch", spans_per_micro_batch=SPANS_PER_MICRO_BATCH,
        )  # fmt: skip
        kept_N, loss_N = chosen.kept_Ws[excerpt.valid_Ws], statistics.loss_Ws[excerpt.valid_Ws].astype(float)
        if fixed_N is None:
            fixed_N = kept_N
        out["steps"].append(0 if checkpoint is checkpoints[0] else checkpoint.step or 0)
        out["kept"].append(float(loss_N[fixed_N].mean()))
        out["other"].append(float(loss_N[~fixed_N].mean()))
        out["precision"].append(float(clean_N[kept_N].mean()))
        out["recall"].append(float(kept_N[clean_N].mean()))
    return out
