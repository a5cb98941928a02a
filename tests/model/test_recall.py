"""Associative recall: values must be found by their keys, so that answers depend on keys and values that have no loss."""

from __future__ import annotations

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_slm.config.architecture import Architecture
from megatron_slm.model.block import Block
from megatron_slm.model.llama import layer_list
from megatron_slm.model.row_sampling import BackwardRows
from megatron_slm.parallel.layers import ParallelLayers

PAIRS, KEYS, VOCAB, SAMPLES = 3, 6, 12, 64
SEEDS = range(5)
ARCH = Architecture(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=4, kv_channels=16,
    vocab_size=VOCAB,
)  # fmt: skip


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then the keys in another order, each with its value to be found."""
    keys = torch.rand(SAMPLES, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, VOCAB, (SAMPLES, PAIRS), generator=generator)
    order = torch.rand(SAMPLES, PAIRS, generator=generator).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), asked], 1)
    return tokens[:, :-1], tokens[:, 1:]


def steps_to_learn(rows: BackwardRows | None, seed: int, *, most: int) -> int | None:
    """Steps until 99 % of the answers are right; None where `most` do not suffice."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(maker.make() for maker in layer_list(ARCH, ParallelLayers(vocabulary_divisible_by=8)))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(most):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
        tokens_bs, labels_bs = batch(generator)
        x_sbd = tokens_bs
        for layer in layers:
            if isinstance(layer, Block):
                key = (seed, step)
                x_sbd = layer(x_sbd, None, rows and BackwardRows(kind=rows.kind, share=rows.share, key=key))
            else:
                x_sbd = layer(x_sbd)
        logits_bsV = (x_sbd @ layers[-1].output.weight.t()).transpose(0, 1)
        answers, labels = logits_bsV[:, 2 * PAIRS :: 2], labels_bs[:, 2 * PAIRS :: 2]
        optimizer.zero_grad()
        F.cross_entropy(answers.flatten(0, 1), labels.flatten()).backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
        optimizer.step()
        if (answers.argmax(-1) == labels).float().mean() >= 0.99:
            return step + 1
    return None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sampled_rows_learn_to_recall_and_kept_rows_do_not() -> None:
    """27 % of the rows have a loss; 37 % of them are drawn. Answers are found all at once, after steps that vary."""
    slower = []
    for seed in SEEDS:
        exact = steps_to_learn(None, seed, most=1000)
        sampled = steps_to_learn(BackwardRows(kind="sampled", share=lambda _: 0.37, key=()), seed, most=2000)
        assert exact is not None, seed
        assert sampled is not None, seed
        slower.append(sampled / exact)
        kept = BackwardRows(kind="kept", share=lambda _: 0.28, key=())
        assert steps_to_learn(kept, seed, most=int(1.5 * exact) + 50) is None, seed
    assert median(slower) <= 1.5, slower
