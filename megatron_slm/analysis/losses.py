"""Per-token losses of a sample: from models of either kind of folder, or from stores that a pass has written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_slm.analysis.sample import Sample, Window
from megatron_slm.checkpoint.format import Manifest as CheckpointManifest
from megatron_slm.checkpoint.format import complete_checkpoints
from megatron_slm.checkpoint.weights import fill_module
from megatron_slm.convert.hf_config import is_hf_folder
from megatron_slm.convert.source import Model, open_model
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import loss_mask_of
from megatron_slm.data.packing import PackedSamples
from megatron_slm.device import local_device
from megatron_slm.errors import AnalysisError, VocabularyError
from megatron_slm.loss.objective import Objective
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.manifest import StoreManifest
from megatron_slm.reference.store import ScoreReader, check_shards
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
BATCH_TOKENS = 8192
"""Tokens of one forward pass."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One point of a run, whose losses are looked at."""

    label: str
    path: str
    million_tokens: float | None = None
    """Tokens the run had read; None where the folder does not say."""
    step: int | None = None


def stages_of(paths: Sequence[str], *, field: str = "--load") -> list[Stage]:
    """Every model that `paths` name, in their order: a run's folder or its checkpoints give all their checkpoints.

    Raises:
        AnalysisError: a path holds neither a Hugging Face model nor checkpoints.
    """
    stages = []
    for path in map(Path, paths):
        inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if is_hf_folder(path):
            stages.append(Stage(label=path.name, path=str(path)))
        elif found := complete_checkpoints(inside):
            stages += [_stage(folder) for folder in found]
        elif (path / "manifest.json").is_file():
            stages.append(_stage(path))
        else:
            raise AnalysisError(
                field,
                str(path),
                "is a Hugging Face folder, a checkpoint, or a run's folder with checkpoints in it",
                "check the path, or train with --save-interval",
            )
    return stages


def _stage(folder: Path) -> Stage:
    manifest = CheckpointManifest.read(folder)
    return Stage(label=f"step {manifest.step:,}", path=str(folder), step=manifest.step)


def open_stage(stage: Stage, first: Model | None, *, field: str = "--load") -> Model:
    """Open a stage's model, and refuse another vocabulary than the first one's.

    Raises:
        VocabularyError: the numbers of tokens differ.
        WeightsError, CheckpointError: see `open_model`.
    """
    model = open_model(stage.path, field=field, checksums=False)
    if first is not None and model.architecture.vocab_size != first.architecture.vocab_size:
        raise VocabularyError(
            f"{field} {stage.path}",
            f"{model.architecture.vocab_size} tokens",
            f"has the vocabulary of the first model, {first.architecture.vocab_size} tokens",
            "losses compare over one vocabulary only: leave this model out",
        )
    return model


class Statistics(NamedTuple):
    """What one model says of each token of a sample, in nats, fp32; 0 where not valid."""

    loss_Ws: Floats
    """-log P(label)."""
    entropy_Ws: Floats | None = None
    """Entropy of the prediction; None where it was not asked for."""


@torch.no_grad()
def model_statistics(model: Model, sample: Sample, *, with_entropy: bool = False) -> Statistics:
    """What a model says of every token of a sample. The whole model in this process, in fp32.

    For models that do not fit, write stores with tools/score_corpus.py at any layout, and read those.

    Raises:
        AnalysisError: windows are longer than the model reads, a token is not in its vocabulary, or a loss is not
            finite.
    """
    _check_readable(model, sample)
    device = local_device()
    stage = FrozenStage(model.architecture, ParallelLayers(), stage=0, num_stages=1)
    fill_module(stage, model.source)
    stage = stage.to(device)
    objective = Objective(selector=Selector(), tp=TensorParallel())
    num_windows, length = sample.valid_Ws.shape
    parts = [np.zeros((num_windows, length), np.float32) for _ in range(1 + with_entropy)]
    rows = max(1, BATCH_TOKENS // length)
    for start in range(0, num_windows, rows):
        part = slice(start, start + rows)
        tokens = torch.from_numpy(sample.tokens_Ws1[part]).to(device)
        valid = torch.from_numpy(sample.valid_Ws[part]).to(device)
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], valid, torch.arange(len(tokens), device=device))
        hidden_sbd = stage(batch.tokens_bs)
        said = objective.statistics(hidden_sbd, stage.output_weight(), batch, with_entropy=with_entropy)
        for whole_Ws, part_N in zip(parts, said, strict=False):
            assert part_N is not None, "the loss gives what it is asked for"
            whole_Ws[part] = part_N.view(valid.shape).float().cpu().numpy()
    _check_finite(parts[0], "losses of the model")
    return Statistics(*parts)


def _check_readable(model: Model, sample: Sample) -> None:
    context, length = model.architecture.max_position_embeddings, sample.valid_Ws.shape[1]
    if length > context:
        raise AnalysisError("--seq-length", length, f"is at most what the model reads, {context}", "give a smaller one")
    highest, vocab_size = int(sample.tokens_Ws1.max()), model.architecture.vocab_size
    if highest >= vocab_size:
        raise AnalysisError(
            "token id",
            highest,
            f"is of the model's vocabulary, below {vocab_size}",
            "give the tokenizer or the corpus that the model was trained with",
        )


def _check_finite(loss_Ws: Floats, what: str) -> None:
    if not np.isfinite(loss_Ws).all():
        count = int((~np.isfinite(loss_Ws)).sum())
        raise AnalysisError(what, f"{count} not finite", "are all finite numbers", "leave this checkpoint out")


def sample_of_store(store: str, prefix: str, tokenizer: Any, *, max_tokens: int) -> Sample:
    """The samples that a store of scores was written for, taken from their corpus again.

    Raises:
        ScoreStoreError: the store is unfinished or damaged.
        AnalysisError: the corpus is another one.
    """
    manifest = StoreManifest.read(Path(store))
    data = manifest.data
    if data.documents != "concatenate":
        raise AnalysisError(
            "--scores", store, f"is of samples that are laid end to end, not `{data.documents}`", "use --load instead"
        )
    corpus = IndexedCorpus(prefix)
    samples = PackedSamples(
        corpus,
        *data.sequences,
        sequence_length=data.sequence_length,
        num_samples=data.num_samples,
        seed=data.seed,
        loss_mask=loss_mask_of(corpus),
    )
    if samples.order_fingerprint != data.sample_order:
        raise AnalysisError(
            "--data-path", prefix, f"is the corpus that {store} was written for", "give that corpus' prefix"
        )
    count = min(data.num_samples, max(1, -(-max_tokens // data.sequence_length)))
    chosen = [samples[index] for index in range(count)]
    return Sample(
        tokens_Ws1=np.stack([one.tokens for one in chosen]),
        valid_Ws=np.stack([one.valid for one in chosen]),
        windows=tuple(Window(source=Path(prefix).name) for _ in chosen),
        tokenizer=tokenizer,
        sample_W=np.arange(count, dtype=np.int64),
    )


def store_losses(store: str, sample: Sample) -> Floats:
    """The losses that a store holds of `sample_of_store`'s sample, fp32 [W, s]; tokens are compared by checksum.

    Raises:
        ScoreStoreError: the store is unfinished, damaged, or of other samples.
    """
    folder = Path(store)
    manifest = StoreManifest.read(folder)
    check_shards(folder, manifest, checksums=False)
    assert sample.sample_W is not None, "only samples of a store have numbers"
    tokens = torch.from_numpy(sample.tokens_Ws1)
    batch = MicroBatch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.from_numpy(sample.valid_Ws),
        torch.from_numpy(sample.sample_W),
    )
    losses: Floats = ScoreReader(folder, manifest).read(batch).loss_bs.numpy()
    return losses
