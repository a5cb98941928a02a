"""The whole step against forty lines of plain PyTorch: transformers' models, full logits, torch's AdamW."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.packing import PackedSamples
from tests.support.runs import SEQ_LENGTH, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

STEPS, BATCH, MICRO, CLIP, DECAY = 4, 8, 2, 0.5, 0.1
EOD = 96


def plain_training(corpus: Path, start: Path, reference_folder: Path, ratio: float, scope: str) -> list[list[float]]:
    """(mean kept loss, gradient norm, kept tokens, mean valid loss, valid tokens) of each step."""
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    reference = LlamaForCausalLM.from_pretrained(reference_folder, dtype=torch.float32).eval()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    opened = IndexedCorpus(corpus)
    samples = PackedSamples(
        opened, 0, opened.num_sequences, sequence_length=SEQ_LENGTH, num_samples=STEPS * BATCH, seed=1234
    )
    report = []
    for step in range(STEPS):
        total, count, all_losses = torch.zeros(()), 0, []
        for first in range(step * BATCH, (step + 1) * BATCH, MICRO):
            tokens = torch.stack([torch.from_numpy(samples[i].tokens) for i in range(first, first + MICRO)])
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
            losses = _losses(model, inputs, labels)
            with torch.no_grad():
                excess = losses.detach() - _losses(reference, inputs, labels)
            valid = inputs != EOD
            all_losses.append(losses.detach()[valid])
            for rows in [slice(i, i + 1) for i in range(MICRO)] if scope == "sequence" else [slice(None)]:
                score = excess[rows][valid[rows]]
                keep = math.ceil(round(ratio * score.numel(), 9))
                chosen = score.sort(descending=True, stable=True).indices[:keep]
                total = total + losses[rows][valid[rows]][chosen].sum()
                count += keep
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        everything = torch.cat(all_losses)
        report.append([float(total.detach() / count), float(norm), count, float(everything.mean()), len(everything)])
    return report


def _losses(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(inputs).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize("scope", ["micro-batch", "sequence"])
def test_steps_equal_plain_pytorch(tmp_path: Path, scope: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    start = save_hf_llama(tmp_path / "start", seed=1, hidden_size=32, num_hidden_layers=2)
    reference = save_hf_llama(tmp_path / "reference", seed=2)
    run_dir = tmp_path / "run"
    architecture = dict.fromkeys(
        ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "init_method_std"]
    )
    values = run_flags(
        corpus, run_dir, **architecture, objective="slm", reference_load=reference, init_from=start, slm_scope=scope,
        train_iters=STEPS, global_batch_size=BATCH, micro_batch_size=MICRO, clip_grad=CLIP, weight_decay=DECAY,
        lr_decay_style="constant", eod_mask_loss=True,
    )  # fmt: skip
    run_world(train_and_report, 1, values)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "kept_tokens", "loss_all", "valid_tokens")
    ours = [[line[name] for name in names] for line in lines]
    expected = plain_training(corpus, start, reference, 0.6, scope)
    for line, plain in zip(ours, expected, strict=True):
        assert line == pytest.approx(plain, rel=2e-5)
    assert any(norm > CLIP for _, norm, *_ in expected), "clipping was not exercised"
