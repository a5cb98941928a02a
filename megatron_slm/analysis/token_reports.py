"""Reports on tokens: which are kept, and how their losses change over a run's checkpoints."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.analysis.dynamics import LEAST_CHECKPOINTS, Dynamics, check_order, classify
from megatron_slm.analysis.dynamics_page import Looked, most_fluctuating_rows, write_dynamics
from megatron_slm.analysis.kept import Kept, select
from megatron_slm.analysis.losses import (
    Stage,
    Statistics,
    model_statistics,
    open_stage,
    sample_of_store,
    stages_of,
    store_losses,
)
from megatron_slm.analysis.probe_records import recorded_losses
from megatron_slm.analysis.sample import Sample, load_tokenizer, sample_corpus, sample_texts
from megatron_slm.analysis.selection_page import SelectionView, to_json, write_selection
from megatron_slm.convert.source import Model
from megatron_slm.errors import AnalysisError
from megatron_slm.files import write_durably
from megatron_slm.selection.scores import score_named

logger = logging.getLogger(__name__)


def _sample(args: argparse.Namespace, model: Model) -> Sample:
    tokenizer = load_tokenizer(model, args.tokenizer_model) if args.text_file or args.tokenizer_model else None
    if tokenizer is None and model.tokenizer_folder is not None:
        tokenizer = load_tokenizer(model, None)
    context = model.architecture.max_position_embeddings
    if args.seq_length is not None and args.seq_length > context:
        raise AnalysisError("--seq-length", args.seq_length, f"is at most what the model reads, {context}", "lower it")
    length = args.seq_length or min(context, 2048)
    if args.data_path:
        return sample_corpus(args.data_path, tokenizer, sequence_length=length, max_tokens=args.max_tokens)
    return sample_texts(args.text_file, tokenizer, sequence_length=length, max_tokens=args.max_tokens)


def _first(stages: Sequence[Stage]) -> Model:
    """The first model, after a look at all of them: what cannot be compared is refused before anything is computed."""
    first = open_stage(stages[0], None)
    for stage in stages[1:]:
        open_stage(stage, first)
    return first


def _write_json(output: Path, numbers: dict[str, Any]) -> None:
    write_durably(output.with_suffix(".json"), (json.dumps(numbers, indent=1) + "\n").encode())
    sys.stdout.write(f"wrote {output} and {output.with_suffix('.json').name}\n")


# ---- dynamics -----------------------------------------------------------------------------------------------


def dynamics_report(args: argparse.Namespace) -> None:
    """Losses of one sample at every checkpoint, their classes, the page.

    Raises:
        SlmError: too few checkpoints, or what cannot be read or compared.
    """
    source = _recorded if args.probe else _stored if args.scores else _computed
    sample, stages, loss_CN = source(args)
    steps = [stage.step for stage in stages]
    position_C = None if None in steps else np.array(steps, np.float64)
    dynamics = classify(loss_CN, position_C, threshold_nats=args.threshold)
    looked = Looked(sample=sample, stages=stages, loss_CN=loss_CN, dynamics=dynamics)
    write_dynamics(looked, args.output, documents=args.documents, most=args.most)
    _print_shares(dynamics)
    numbers = {
        "checkpoints": [stage.path for stage in stages],
        "steps": steps,
        "threshold_nats": args.threshold,
        **dynamics.to_json(),
        "most_fluctuating": most_fluctuating_rows(looked, args.most),
    }
    _write_json(args.output, numbers)


def _print_shares(dynamics: Dynamics) -> None:
    for name, share in dynamics.shares.items():
        sys.stdout.write(f"{name}  {share:6.1%}\n")


def _computed(args: argparse.Namespace) -> tuple[Sample, list[Stage], Any]:
    stages = stages_of(args.load)
    if len(stages) < 3:
        raise AnalysisError(
            "--load",
            [stage.path for stage in stages],
            "names three checkpoints or more: a trend and its fluctuation need that many",
            "name a run's folder, and train with a smaller --save-interval",
        )
    steps = [stage.step for stage in stages]
    check_order([step for step in steps if step is not None] if None not in steps else [])
    first = _first(stages)
    sample = _sample(args, first)
    loss_CN = np.empty((len(stages), sample.num_tokens), np.float32)
    for row, stage in enumerate(stages):
        logger.info("%s (%d of %d)", stage.path, row + 1, len(stages))
        loss_CN[row] = model_statistics(open_stage(stage, first), sample).loss_Ws[sample.valid_Ws]
    return sample, stages, loss_CN


def _recorded(args: argparse.Namespace) -> tuple[Sample, list[Stage], Any]:
    sample, stages, loss_CN = recorded_losses(args.probe)
    if len(stages) < LEAST_CHECKPOINTS:
        raise AnalysisError(
            "--probe",
            args.probe,
            f"has records of {LEAST_CHECKPOINTS} steps or more, not {len(stages)}: a trend needs that many",
            "train with a smaller --eval-interval",
        )
    return sample, stages, loss_CN


def _stored(args: argparse.Namespace) -> tuple[Sample, list[Stage], Any]:
    if args.data_path is None:
        raise AnalysisError("--data-path", None, "is the corpus that the stores were written for", "name its prefix")
    tokenizer = load_tokenizer(None, args.tokenizer_model) if args.tokenizer_model else None
    sample = sample_of_store(args.scores[0], args.data_path, tokenizer, max_tokens=args.max_tokens)
    loss_CN = np.stack([store_losses(store, sample)[sample.valid_Ws] for store in args.scores])
    return sample, [Stage(label=Path(store).name, path=store) for store in args.scores], loss_CN


# ---- selection ----------------------------------------------------------------------------------------------


def selection_report(args: argparse.Namespace) -> None:
    """What the models of `--load` keep with the reference, what the last one keeps with others, the page.

    Raises:
        SlmError: a reference is missing, or what cannot be read or compared.
    """
    score = score_named(args.slm_score)
    if score.needs_reference and not args.reference_load:
        raise AnalysisError(
            "--reference-load", None, f"is given for --slm-score {score.name}", "name the reference's folder"
        )
    stages = stages_of(args.load)
    first = _first(stages)
    reference_stages = [stages_of([path], field="--reference-load")[-1] for path in args.reference_load]
    for stage in reference_stages:
        open_stage(stage, first, field="--reference-load")
    sample = _sample(args, first)
    needs = score.needs
    references = [
        (stage.label, _said(stage, first, sample, "--reference-load", "reference-entropy" in needs))
        for stage in reference_stages
    ]
    reference = references[0][1] if references else None

    def keep(name: str, said: Statistics, of: Statistics | None, step: int | None = None) -> Kept:
        kept = select(
            name, sample, said, of, score=score, keep_ratio=args.slm_keep_ratio, scope=args.slm_scope,
            windows_together=args.micro_batch_size, seed=args.seed,
        )  # fmt: skip
        return replace(kept, step=step)

    kept = []
    for stage in stages:
        said = _said(stage, first, sample, "--load", "entropy" in needs)
        kept.append(keep(f"{Path(stage.path).name}", said, reference, stage.step))
    others = [keep(f"{kept[-1].name}, reference {name}", said, other) for name, other in references[1:]]
    view = SelectionView(
        sample=sample,
        model=said,
        reference=reference,
        kept=kept,
        by_reference=others,
        score=f"{score.name}: {score.formula}",
        keep_ratio=args.slm_keep_ratio,
    )
    write_selection(view, args.output, documents=args.documents)
    _write_json(args.output, to_json(view))


def _said(stage: Stage, first: Model, sample: Sample, field: str, with_entropy: bool) -> Statistics:
    logger.info("%s", stage.path)
    return model_statistics(open_stage(stage, first, field=field), sample, with_entropy=with_entropy)
