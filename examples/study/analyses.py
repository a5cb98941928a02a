"""What is looked at in every finished run: its kept tokens, its answers, the dynamics of its tokens."""

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
from megatron_slm.cli.analyze_tokens import main as analyze
from megatron_slm.cli.evaluate import main as evaluate
from megatron_slm.files import write_durably
from megatron_slm.selection.scores import score_named

if TYPE_CHECKING:
    from study import Planned

SEQUENCE_LENGTH, SPANS_PER_MICRO_BATCH = 128, 16
"""As in training."""


def analyse(out: Path, runs: Sequence[Planned]) -> None:
    """Look at every finished run; what is there is not done again."""
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
                analyze, "selection", "--load", newest, *selection, "--text-file", text,
                "--micro-batch-size", SPANS_PER_MICRO_BATCH, "--output", folder / "selection.html",
            )  # fmt: skip
        if run.answers and not (folder / "answers.json").exists():
            _call(
                evaluate, "--model", folder, "--task", f"arithmetic:gsm8k={questions}", "--prompt-file", prompt,
                "--max-new-tokens", 90, "--batch-size", 100, "--output", folder / "answers.json",
            )  # fmt: skip
        if run.followed and not (folder / "followed.json").exists():
            write_durably(folder / "followed.json", (json.dumps(follow(folder, text)) + "\n").encode())
        if not (folder / "inside.json").exists():
            write_durably(folder / "inside.json", (json.dumps(inside(out, folder)) + "\n").encode())
        if run.name == "clm" and not (folder / "dynamics.json").exists():
            _call(analyze, "dynamics", "--load", folder, "--text-file", text, "--output", folder / "dynamics.html")


def inside(out: Path, run: Path) -> dict[str, list[float]]:
    """The target loss over a run's checkpoints, taken apart: at the ends of problems, and inside them.

    An end is the end-of-document token and the token after it. On curated text both are certain, on pages neither is:
    a model that has taken over the reference's idea of what follows what gains there without being any better at
    arithmetic.
    """
    stages = [checkpoints_in([str(run.parent / "base")])[-1], *checkpoints_in([str(run)])]
    first = open_comparable(stages[0], None)
    tokenizer = load_tokenizer(first, None)
    corpus = str(out / "corpora" / "curated_heldout_text_document")
    excerpt = excerpt_of_corpus(corpus, tokenizer, sequence_length=SEQUENCE_LENGTH, max_tokens=1 << 62)
    end_Ws1 = excerpt.tokens_Ws1 == tokenizer.eos_token_id
    ends_N = (end_Ws1[:, 1:] | end_Ws1[:, :-1])[excerpt.valid_Ws]
    out_of: dict[str, list[float]] = {"steps": [], "ends": [], "inside": [], "ends_share": [float(ends_N.mean())]}
    for stage in stages:
        loss_N = model_statistics(open_comparable(stage, first), excerpt).loss_Ws[excerpt.valid_Ws].astype(float)
        out_of["steps"].append(0 if stage is stages[0] else stage.step or 0)
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
    """Losses of kept and of other tokens over a run's checkpoints (the paper's figure 6), from the base model on.

    The tokens are those of held-out pages that the base model would keep with the reference, so they are the same for
    every run of a seed. Beside them: precision and recall, against the clean tokens, of what the model of each
    checkpoint would keep.
    """
    stages = [checkpoints_in([str(run.parent / "base")])[-1], *checkpoints_in([str(run)])]
    first = open_comparable(stages[0], None)
    tokenizer = load_tokenizer(first, None)
    excerpt = excerpt_of_texts([str(text)], tokenizer, sequence_length=SEQUENCE_LENGTH, max_tokens=1 << 62)
    clean_N = np.array([kind == CLEAN for row in excerpt.spans for kind in row.kinds[1:]])
    reference = model_statistics(open_comparable(checkpoints_in([str(run.parent / "reference")])[-1], first), excerpt)
    out: dict[str, list[float]] = {"steps": [], "kept": [], "other": [], "precision": [], "recall": []}
    fixed_N = None
    for stage in stages:
        said = model_statistics(open_comparable(stage, first), excerpt)
        chosen = select(
            stage.label, excerpt, said, reference, score=score_named("excess"), keep_ratio=keep_ratio,
            scope="micro-batch", spans_per_micro_batch=SPANS_PER_MICRO_BATCH,
        )  # fmt: skip
        kept_N, loss_N = chosen.kept_Ws[excerpt.valid_Ws], said.loss_Ws[excerpt.valid_Ws].astype(float)
        if fixed_N is None:
            fixed_N = kept_N
        out["steps"].append(0 if stage is stages[0] else stage.step or 0)
        out["kept"].append(float(loss_N[fixed_N].mean()))
        out["other"].append(float(loss_N[~fixed_N].mean()))
        out["precision"].append(float(clean_N[kept_N].mean()))
        out["recall"].append(float(kept_N[clean_N].mean()))
    return out
