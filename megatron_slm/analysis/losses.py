"""Token losses of an excerpt: computed by models, or read from stores of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_slm.analysis.excerpt import Excerpt, Span
from megatron_slm.arithmetic import ceil_div
from megatron_slm.checkpoint.format import Manifest, complete_checkpoints
from megatron_slm.checkpoint.weights import fill_module
from megatron_slm.convert.hf_config import is_hf_folder
from megatron_slm.convert.source import Model, open_model
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import loss_mask_of
from megatron_slm.data.packing import PackedSamples
from megatron_slm.device import local_device
from megatron_slm.errors import AnalysisError, VocabularyError
from megatron_slm.hub import local_path
from megatron_slm.loss.objective import Objective
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.progress import track
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.reference.manifest import StoreManifest
from megatron_slm.reference.store import ScoreReader, check_shards
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch

Floats = npt.NDArray[np.float32]
BATCH_TOKENS = 8192
"""Tokens of one forward pass."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model to analyze: a checkpoint of a run or a Hugging Face folder."""

    label: str
    path: str
    step: int | None = None
    """Step of the run; None for a Hugging Face folder."""


def checkpoints_in(paths: Sequence[str], *, field: str = "--load") -> list[Checkpoint]:
    """List the models that paths or names of the hub name, in order; a run's folder yields all its checkpoints.

    Raises:
        AnalysisError: a path holds neither a Hugging Face model nor checkpoints.
    """
    checkpoints = []
    for name in paths:
        path = local_path(name, field=field)
        inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if is_hf_folder(path):
            checkpoints.append(Checkpoint(label=Path(name).name, path=str(path)))
        elif found := complete_checkpoints(inside):
            checkpoints += map(_checkpoint, found)
        elif (path / "manifest.json").is_file():
            checkpoints.append(_checkpoint(path))
        else:
            raise AnalysisError(
                field,
                name,
                "be a Hugging Face folder, a checkpoint, or a run's folder with checkpoints",
                "check the path, or train with --save-interval",
            )
    return checkpoints


def _checkpoint(folder: Path) -> Checkpoint:
    step = Manifest.read(folder).step
    return Checkpoint(label=f"step {step:,}", path=str(folder), step=step)


def open_comparable(checkpoint: Checkpoint, first: Model | None, *, field: str = "--load") -> Model:
    """Open a checkpoint's model and check that its vocabulary has the size of the first model's.

    Raises:
        VocabularyError: the sizes differ.
        WeightsError, CheckpointError: the model cannot be opened.
    """
    model = open_model(checkpoint.path, field=field, checksums=False)
    if first is not None and model.architecture.vocab_size != first.architecture.vocab_size:
        raise VocabularyError(
            f"{field}: vocabulary size of {checkpoint.path}",
            model.architecture.vocab_size,
            f"equal the first model's, {first.architecture.vocab_size}",
            "leave this model out: losses over different vocabularies are not comparable",
        )
    return model


class ModelStatistics(NamedTuple):
    """One model's statistics of every token of an excerpt, in nats, fp32 [W, s]; 0 where not valid."""

    loss_Ws: Floats
    """-log P(label)."""
    entropy_Ws: Floats | None = None
    """Entropy of the predicted distribution; None if not computed."""


@torch.no_grad()
def model_statistics(model: Model, excerpt: Excerpt, *, with_entropy: bool = False) -> ModelStatistics:
    """Compute a model's statistics of every token of an excerpt, with the whole model in this process, in fp32.

    For models too large for one process, write stores with tools/score_corpus.py in any layout and read those.

    Raises:
        AnalysisError: a span exceeds the model's context, a token is not in its vocabulary, or a loss is not finite.
    """
    _check_readable(model, excerpt)
    device = local_device()
    stage = FrozenStage(model.architecture, ParallelLayers(), stage=0, num_stages=1)
    fill_module(stage, model.source)
    stage = stage.to(device)
    objective = Objective(selector=Selector(), tp=TensorParallel())
    num_spans, length = excerpt.valid_Ws.shape
    loss_Ws = np.zeros((num_spans, length), np.float32)
    entropy_Ws = np.zeros((num_spans, length), np.float32) if with_entropy else None
    batch_size = max(1, BATCH_TOKENS // length)
    starts = range(0, num_spans, batch_size)
    for start in track(starts, f"losses of {model.source.folder.name}", "batches"):
        rows = slice(start, start + batch_size)
        tokens = torch.from_numpy(excerpt.tokens_Ws1[rows]).to(device)
        valid_bs = torch.from_numpy(excerpt.valid_Ws[rows]).to(device)
        batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], valid_bs, torch.arange(len(tokens), device=device))
        hidden_sbd = stage(batch.tokens_bs)
        found = objective.statistics(hidden_sbd, stage.output_weight(), batch, with_entropy=with_entropy)
        loss_Ws[rows] = _array(found.loss_N, valid_bs.shape)
        if entropy_Ws is not None:
            assert found.entropy_N is not None, "computed with with_entropy"
            entropy_Ws[rows] = _array(found.entropy_N, valid_bs.shape)
    if not np.isfinite(loss_Ws).all():
        raise AnalysisError(
            f"{model.source.folder}: number of non-finite losses",
            int((~np.isfinite(loss_Ws)).sum()),
            "be 0",
            "leave this checkpoint out",
        )
    return ModelStatistics(loss_Ws, entropy_Ws)


def _array(values_N: torch.Tensor, shape: torch.Size) -> Floats:
    array: Floats = values_N.view(shape).float().cpu().numpy()
    return array


def _check_readable(model: Model, excerpt: Excerpt) -> None:
    context, length = model.architecture.max_position_embeddings, excerpt.valid_Ws.shape[1]
    if length > context:
        raise AnalysisError("--seq-length", length, f"be at most {context}, the model's context length", "lower it")
    highest, vocab_size = int(excerpt.tokens_Ws1.max()), model.architecture.vocab_size
    if highest >= vocab_size:
        raise AnalysisError(
            "largest token id",
            highest,
            f"be less than {vocab_size}, the model's vocabulary size",
            "use the tokenizer or the corpus that the model was trained with",
        )


def excerpt_of_store(store: str, prefix: str, tokenizer: Any, *, max_tokens: int) -> Excerpt:
    """Read the samples that a store of scores covers from their corpus.

    Raises:
        ScoreStoreError: the store is incomplete or damaged.
        AnalysisError: the store was written for another corpus, or its samples are not concatenated documents.
    """
    data = StoreManifest.read(Path(store)).data
    if data.documents != "concatenate":
        raise AnalysisError(
            "--scores", store, f"hold scores of concatenated documents, not {data.documents!r}", "use --load instead"
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
        raise AnalysisError("--data-path", prefix, f"be the corpus of the store {store}", "name that corpus's prefix")
    count = min(data.num_samples, max(1, ceil_div(max_tokens, data.sequence_length)))
    chosen = [samples[index] for index in range(count)]
    return Excerpt(
        tokens_Ws1=np.stack([sample.tokens for sample in chosen]),
        valid_Ws=np.stack([sample.valid for sample in chosen]),
        spans=tuple(Span(source=Path(prefix).name) for _ in chosen),
        tokenizer=tokenizer,
        sample_W=np.arange(count, dtype=np.int64),
    )


def store_losses(store: str, excerpt: Excerpt) -> Floats:
    """Read a store's losses for an excerpt made by `excerpt_of_store`, fp32 [W, s]; verifies tokens by checksum.

    Raises:
        ScoreStoreError: the store is incomplete, damaged, or covers other samples.
    """
    folder = Path(store)
    manifest = StoreManifest.read(folder)
    check_shards(folder, manifest, checksums=False)
    assert excerpt.sample_W is not None, "set by excerpt_of_store"
    tokens = torch.from_numpy(excerpt.tokens_Ws1)
    batch = MicroBatch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.from_numpy(excerpt.valid_Ws),
        torch.from_numpy(excerpt.sample_W),
    )
    losses: Floats = ScoreReader(folder, manifest).read(batch).loss_bs.numpy()
    return losses
