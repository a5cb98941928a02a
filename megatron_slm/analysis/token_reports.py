"""Reports on tokens: which ones are kept, and how their losses change over a run's checkpoints."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.analysis.dynamics import MIN_CHECKPOINTS, check_order, classify
from megatron_slm.analysis.dynamics_page import DynamicsView, most_fluctuating_rows, write_dynamics
from megatron_slm.analysis.excerpt import Excerpt, excerpt_of_corpus, excerpt_of_texts, load_tokenizer
from megatron_slm.analysis.kept import KeptTokens, select
from megatron_slm.analysis.losses import (
    Checkpoint,
    Floats,
    ModelStatistics,
    checkpoints_in,
    excerpt_of_store,
    model_statistics,
    open_comparable,
    store_losses,
)
from megatron_slm.analysis.probe_records import recorded_losses
from megatron_slm.analysis.selection_page import SelectionView, to_json, write_selection
from megatron_slm.convert.source import Model
from megatron_slm.errors import AnalysisError
from megatron_slm.files import write_durably
from megatron_slm.selection.scores import score_named

logger = logging.getLogger(__name__)


def _excerpt(args: argparse.Namespace, model: Model) -> Excerpt:
    context = model.architecture.max_position_embeddings
    if args.seq_length is not None and args.seq_length > context:
        raise AnalysisError(
            "--seq-length", args.seq_length, f"be at most {context}, the model's context length", "lower it"
        )
    length = args.seq_length or min(context, 2048)
    needs_tokenizer = args.text_file or args.tokenizer_model or model.tokenizer_folder is not None
    tokenizer = load_tokenizer(model, args.tokenizer_model) if needs_tokenizer else None
    if args.data_path:
        return excerpt_of_corpus(args.data_path, tokenizer, sequence_length=length, max_tokens=args.max_tokens)
    return excerpt_of_texts(args.text_file, tokenizer, sequence_length=length, max_tokens=args.max_tokens)


def _open_first(checkpoints: Sequence[Checkpoint]) -> Model:
    """Open the first model, after checking that all the others are comparable to it."""
    first = open_comparable(checkpoints[0], None)
    for checkpoint in checkpoints[1:]:
        open_comparable(checkpoint, first)
    return first


def _write_json(output: Path, numbers: dict[str, Any]) -> None:
    write_durably(output.with_suffix(".json"), (json.dumps(numbers, indent=1) + "\n").encode())
    print(f"wrote {output} and {output.with_suffix('.json').name}")


# ---- dynamics -----------------------------------------------------------------------------------------------


def dynamics_report(args: argparse.Namespace) -> None:
    """Classify tokens by their losses at every checkpoint; write the page and its numbers.

    Raises:
        SlmError: there are too few checkpoints, or an input cannot be read or compared.
    """
    if args.probe:
        excerpt, checkpoints, loss_CN = _recorded(args)
    elif args.scores:
        excerpt, checkpoints, loss_CN = _stored(args)
    else:
        excerpt, checkpoints, loss_CN = _computed(args)
    steps = [checkpoint.step for checkpoint in checkpoints]
    position_C = None if None in steps else np.array(steps, np.float64)
    dynamics = classify(loss_CN, position_C, threshold_nats=args.threshold)
    view = DynamicsView(excerpt=excerpt, checkpoints=checkpoints, loss_CN=loss_CN, dynamics=dynamics)
    write_dynamics(view, args.output, documents=args.documents, most=args.most)
    for name, share in dynamics.shares.items():
        print(f"{name}  {share:6.1%}")
    numbers = {
        "checkpoints": [checkpoint.path for checkpoint in checkpoints],
        "steps": steps,
        "threshold_nats": args.threshold,
        **dynamics.to_json(),
        "most_fluctuating": most_fluctuating_rows(view, args.most),
    }
    _write_json(args.output, numbers)


def _computed(args: argparse.Namespace) -> tuple[Excerpt, list[Checkpoint], Floats]:
    checkpoints = checkpoints_in(args.load)
    if len(checkpoints) < MIN_CHECKPOINTS:
        raise AnalysisError(
            "--load",
            [checkpoint.path for checkpoint in checkpoints],
            f"name at least {MIN_CHECKPOINTS} checkpoints, to show a trend and its fluctuation",
            "name a run's folder, and train with a smaller --save-interval",
        )
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    if len(steps) == len(checkpoints):
        check_order(steps)
    first = _open_first(checkpoints)
    excerpt = _excerpt(args, first)
    loss_CN = np.empty((len(checkpoints), excerpt.num_tokens), np.float32)
    for row, checkpoint in enumerate(checkpoints):
        logger.info("computing losses of %s (%d of %d)", checkpoint.path, row + 1, len(checkpoints))
        loss_CN[row] = model_statistics(open_comparable(checkpoint, first), excerpt).loss_Ws[excerpt.valid_Ws]
    return excerpt, checkpoints, loss_CN


def _recorded(args: argparse.Namespace) -> tuple[Excerpt, list[Checkpoint], Floats]:
    excerpt, checkpoints, loss_CN = recorded_losses(args.probe)
    if len(checkpoints) < MIN_CHECKPOINTS:
        raise AnalysisError(
            "--probe: number of recorded steps",
            len(checkpoints),
            f"be at least {MIN_CHECKPOINTS} to show a trend and its fluctuation",
            "train with a smaller --eval-interval",
        )
    return excerpt, checkpoints, loss_CN


def _stored(args: argparse.Namespace) -> tuple[Excerpt, list[Checkpoint], Floats]:
    if args.data_path is None:
        raise AnalysisError.missing("--data-path", "--scores", "name the prefix of the corpus that was scored")
    tokenizer = load_tokenizer(None, args.tokenizer_model) if args.tokenizer_model else None
    excerpt = excerpt_of_store(args.scores[0], args.data_path, tokenizer, max_tokens=args.max_tokens)
    loss_CN = np.stack([store_losses(store, excerpt)[excerpt.valid_Ws] for store in args.scores])
    return excerpt, [Checkpoint(label=Path(store).name, path=store) for store in args.scores], loss_CN


# ---- selection ----------------------------------------------------------------------------------------------


def selection_report(args: argparse.Namespace) -> None:
    """Select with every model and the first reference, and with the last model and the others; write the page.

    Raises:
        SlmError: a reference is missing, or an input cannot be read or compared.
    """
    score = score_named(args.slm_score)
    if score.needs_reference and not args.reference_load:
        raise AnalysisError.missing("--reference-load", f"--slm-score {score.name}", "name the reference's folder")
    checkpoints = checkpoints_in(args.load)
    first = _open_first(checkpoints)
    references = [checkpoints_in([path], field="--reference-load")[-1] for path in args.reference_load]
    for reference in references:
        open_comparable(reference, first, field="--reference-load")
    excerpt = _excerpt(args, first)

    def statistics_of(checkpoint: Checkpoint, field: str, entropy: str) -> ModelStatistics:
        logger.info("computing losses of %s", checkpoint.path)
        model = open_comparable(checkpoint, first, field=field)
        return model_statistics(model, excerpt, with_entropy=entropy in score.needs)

    def keep(name: str, model: ModelStatistics, reference: ModelStatistics | None) -> KeptTokens:
        return select(
            name,
            excerpt,
            model,
            reference,
            score=score,
            keep_ratio=args.slm_keep_ratio,
            scope=args.slm_scope,
            spans_per_micro_batch=args.micro_batch_size,
            seed=args.seed,
        )

    of_references = [statistics_of(reference, "--reference-load", "reference-entropy") for reference in references]
    first_reference = of_references[0] if of_references else None
    kept = []
    for checkpoint in checkpoints:
        statistics = statistics_of(checkpoint, "--load", "entropy")
        kept.append(replace(keep(Path(checkpoint.path).name, statistics, first_reference), step=checkpoint.step))
    by_reference = [
        keep(f"{kept[-1].name}, reference {reference.label}", statistics, of_reference)
        for reference, of_reference in zip(references[1:], of_references[1:], strict=True)
    ]
    view = SelectionView(
        excerpt=excerpt,
        model=statistics,
        reference=first_reference,
        kept=kept,
        by_reference=by_reference,
        score=f"{score.name}: {score.formula}",
        keep_ratio=args.slm_keep_ratio,
    )
    write_selection(view, args.output, documents=args.documents)
    _write_json(args.output, to_json(view))
