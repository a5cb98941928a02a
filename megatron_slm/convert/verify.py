"""Do our model and transformers', given the same weights, give every token the same log-probability?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.checkpoint.weights import fill_module
from megatron_slm.convert.hf_config import is_hf_folder
from megatron_slm.convert.source import Model, open_model
from megatron_slm.errors import WeightsError
from megatron_slm.loss.objective import Objective
from megatron_slm.parallel.groups import TensorParallel
from megatron_slm.parallel.layers import ParallelLayers
from megatron_slm.reference.frozen import FrozenStage
from megatron_slm.selection.selector import Selector
from megatron_slm.types import MicroBatch

TOLERANCE_NATS = 1e-4
"""Largest difference of a token's log-probability, both sides in fp32."""
MAX_TOKENS = 4096


def verify(hf: str, load: str | None, text_file: str | None) -> float:
    """Largest difference of any token's log-probability, in nats, over a text (or random tokens).

    Args:
        hf: Hugging Face folder, run by transformers in fp32.
        load: a checkpoint of ours; without it the folder's own weights go through our model.
        text_file: plain text; without it random token ids from a fixed seed.

    Raises:
        WeightsError: the two are not the same architecture.
    """
    if not is_hf_folder(Path(hf)):
        raise WeightsError("--hf", hf, "is a Hugging Face folder (with a config.json)", "check the path")
    theirs = open_model(hf, field="--hf")
    ours = open_model(load, field="--load") if load else theirs
    if ours.architecture.vocab_size != theirs.architecture.vocab_size:
        raise WeightsError(
            "--load",
            ours.architecture.vocab_size,
            f"has the folder's vocabulary of {theirs.architecture.vocab_size} tokens",
            "compare a checkpoint with its own export",
        )
    tokens_bs = _tokens(theirs, hf, text_file)
    return float((_our_losses(ours, tokens_bs) - _their_losses(hf, tokens_bs)).abs().max())


def _tokens(model: Model, hf: str, text_file: str | None) -> Tensor:
    length = min(model.architecture.max_position_embeddings, 1024) + 1
    if text_file is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.architecture.vocab_size, (2, length), generator=generator)
    from transformers import AutoTokenizer

    text = Path(text_file).read_text()
    ids = AutoTokenizer.from_pretrained(hf, local_files_only=True)(text)["input_ids"][:MAX_TOKENS]
    if len(ids) < 2:
        raise WeightsError("--text-file", text_file, "holds at least two tokens", "use a longer text")
    length = min(length, len(ids))
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def _our_losses(model: Model, tokens_bs: Tensor) -> Tensor:
    stage = FrozenStage(model.architecture, ParallelLayers(), stage=0, num_stages=1)
    fill_module(stage, model.source)
    objective = Objective(selector=Selector(), tp=TensorParallel())
    inputs, labels = tokens_bs[:, :-1], tokens_bs[:, 1:]
    batch = MicroBatch(inputs, labels, torch.ones_like(labels, dtype=torch.bool), torch.arange(len(inputs)))
    return stage.statistics(stage(inputs), objective, batch).loss_N.view_as(labels)


@torch.no_grad()
def _their_losses(hf: str, tokens_bs: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    logits_bsV = model(tokens_bs[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits_bsV.transpose(1, 2), tokens_bs[:, 1:], reduction="none")
