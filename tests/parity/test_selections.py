"""Selections in whole runs: alike at every layout, as in plain PyTorch, and bit for bit across a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_slm.checkpoint.format import Manifest
from megatron_slm.data.corpus.columns import ColumnWriter
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.packing import PackedSamples
from tests.support.runs import SEQ_LENGTH, recorded, run_flags, save_hf_llama, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

LAYOUTS = {
    "111": {},
    "112": {},
    "211": {"pipeline_model_parallel_size": 2},
    "122": {"tensor_model_parallel_size": 2},
    "212": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("selections")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference", seed=2)
    save_hf_llama(path / "start", seed=1, hidden_size=32, num_hidden_layers=2)
    return path


def lines_of(run_dir: Path, event: str | None = None) -> list[dict[str, Any]]:
    return [line for line in recorded(run_dir) if line.get("event") == event]


def train(folder: Path, run_dir: Path, layout: str = "111", **changes: Any) -> list[dict[str, Any]]:
    values = {"objective": "slm", "train_iters": 3, **LAYOUTS[layout], **changes}
    world_size = math.prod(int(x) for x in layout)
    return run_world(train_and_report, world_size, run_flags(folder / "corpus", run_dir, **values))


def kept_by_sample(reports: list[dict[str, Any]], num_samples: int) -> dict[bytes, list[int]]:
    """The kept positions of each sample of the first steps, however samples were put into micro-batches."""
    merged: dict[bytes, list[int]] = {}
    for report in reports:
        for tokens, kept in report["kept"]:
            for i, sample in enumerate(np.frombuffer(tokens, dtype=np.int64).reshape(-1, SEQ_LENGTH)):
                own = [k - i * SEQ_LENGTH for k in kept if i * SEQ_LENGTH <= k < (i + 1) * SEQ_LENGTH]
                assert merged.setdefault(sample.tobytes(), own) == own, "ranks kept different tokens"
    assert len(merged) == num_samples, "a sample came twice"
    return merged


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    done: dict[str, Any] = {}

    def run(**changes: Any) -> tuple[Any, Any]:
        key = str(sorted(changes.items()))
        if key not in done:
            run_dir = tmp_path_factory.mktemp("one")
            done[key] = (kept_by_sample(train(folder, run_dir, **changes), 24), lines_of(run_dir))
        return done[key]

    return run


COLUMNS = ("loss", "loss_all", "excess_selected", "excess_unselected", "kept_tokens", "grad_norm")


@pytest.mark.parametrize("layout", ["112", "122", "212"])
def test_ranking_over_data_parallel_ranks_is_ranking_in_one_process(
    layout: str, folder: Path, tmp_path: Path, one_process: Any
) -> None:
    """Half of the clipped excesses are 0, so the last places go to ties across the ranks' border."""
    common = {"reference_load": folder / "reference", "slm_score": "clipped-excess", "slm_keep_ratio": 0.8}
    kept, lines = one_process(micro_batch_size=4, **common)
    reports = train(folder, tmp_path / "run", layout, slm_scope="data-parallel", **common)
    assert kept_by_sample(reports, 24) == kept
    for name in COLUMNS:
        ours, theirs = ([line[name] for line in x] for x in (lines_of(tmp_path / "run"), lines))
        assert ours == pytest.approx(theirs, rel=1e-5), name
    assert lines[0]["score_p05"] == 0


def test_scopes_are_a_choice(folder: Path, one_process: Any) -> None:
    common = {"reference_load": folder / "reference", "slm_score": "clipped-excess", "slm_keep_ratio": 0.8}
    assert one_process(micro_batch_size=4, **common)[0] != one_process(micro_batch_size=2, **common)[0]


@pytest.mark.parametrize("layout", ["122", "212"])
def test_random_selections_do_not_depend_on_the_layout(
    layout: str, folder: Path, tmp_path: Path, one_process: Any
) -> None:
    """A random score, and a random sample by another score; no reference is needed."""
    for i, changes in enumerate(({"slm_score": "random"}, {"slm_score": "entropy", "slm_policy": "sample"})):
        kept, lines = one_process(**changes)
        assert kept_by_sample(train(folder, tmp_path / str(i), layout, **changes), 24) == kept
        assert [line["kept_tokens"] for line in lines] == [80] * 3  # 4 x ceil(0.6 x 32)
        assert {line["reference_loss"] for line in lines} == {None}
    assert one_process(slm_score="random")[0] != one_process(slm_score="random", seed=5)[0]


@pytest.fixture(scope="module")
def columns(folder: Path) -> None:
    """Random scores beside the corpus, and spans of which some are protected and some excluded."""
    corpus, generator = IndexedCorpus(folder / "corpus"), np.random.default_rng(5)
    with ColumnWriter(folder / "corpus", "quality") as quality, ColumnWriter(folder / "corpus", "spans") as spans:
        for length in corpus.sequence_lengths.tolist():
            quality.add(generator.normal(size=length))
            spans.add(np.repeat(generator.integers(-1, 2, length), generator.integers(1, 4))[:length])


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("layout", ["122", pytest.param("212", marks=pytest.mark.slow)])
def test_columns_and_weights_do_not_depend_on_the_layout(
    layout: str, folder: Path, tmp_path: Path, one_process: Any
) -> None:
    """Runs of low scores are dropped but for protected spans, and the kept weighted by the top logits' entropy."""
    common = {
        "slm_score": "external:quality", "slm_policy": "peaking", "slm_protected_spans": "spans", "slm_weight": "eaft",
        "slm_weight_normalization": "mean", "slm_keep_ratio": 0.7,
    }  # fmt: skip
    kept, lines = one_process(micro_batch_size=4, **common)
    reports = train(folder, tmp_path / "run", layout, slm_scope="data-parallel", **common)
    assert kept_by_sample(reports, 24) == kept
    for name in ("loss", "loss_all", "kept_tokens", "grad_norm"):
        ours, theirs = ([line[name] for line in x] for x in (lines_of(tmp_path / "run"), lines))
        assert ours == pytest.approx(theirs, rel=1e-5), name
    assert one_process(micro_batch_size=4, **{**common, "slm_protected_spans": None})[0] != kept


STEPS, BATCH, MICRO, EOD = 3, 8, 2, 96
Chosen = tuple[torch.Tensor, float]
"""The weight of each token of a micro-batch [n], and what its loss is divided by."""


def top(score: torch.Tensor, ratio: float) -> torch.Tensor:
    count = math.ceil(round(ratio * len(score), 9))
    mask = torch.zeros(len(score))
    mask[score.sort(descending=True, stable=True).indices[:count]] = 1.0
    return mask


class QuantileOracle:
    """Keeps its running threshold, as the run does between steps."""

    def __init__(self) -> None:
        self.threshold: float | None = None
        self.measured: list[tuple[float, int]] = []

    def __call__(self, x: dict[str, torch.Tensor]) -> Chosen:
        own = float(x["loss"].sort(descending=True).values[math.ceil(round(0.5 * len(x["loss"]), 9)) - 1])
        self.measured.append((own, len(x["loss"])))
        lowest = own if self.threshold is None else self.threshold
        return (x["loss"] >= lowest).float(), 0.5 * len(x["loss"])

    def end_step(self) -> None:
        mean = sum(own * n for own, n in self.measured) / sum(n for _, n in self.measured)
        self.threshold = mean if self.threshold is None else 0.75 * self.threshold + 0.25 * mean
        self.measured = []


def with_count(mask: torch.Tensor) -> Chosen:
    return mask, float(mask.sum())


def soft(x: dict[str, torch.Tensor]) -> Chosen:
    n = len(x["loss"])
    return 0.1 + 0.9 * n * torch.softmax((x["loss"] - x["reference_loss"]) / 2.0, 0), float(n)


def weighted(mask: torch.Tensor, weight: torch.Tensor) -> Chosen:
    """Weights with mean 1 over the kept tokens."""
    return mask * weight * mask.sum() / (mask * weight).sum(), float(mask.sum())


CASES: dict[str, tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], Chosen]]] = {
    "entropy": ({"slm_score": "entropy", "reference_load": None}, lambda x: with_count(top(x["entropy"], 0.6))),
    "self-reference": (
        {"slm_score": ["reference-loss", "reference-entropy"], "slm_combine": "intersection", "slm_combine_ratios": [0.7, 0.8]},
        lambda x: with_count(top(-x["reference_loss"], 0.7) * top(-x["reference_entropy"], 0.8)),
    ),
    "threshold": (
        {"slm_policy": "threshold", "slm_threshold": -0.25},
        lambda x: with_count((x["loss"] - x["reference_loss"] >= -0.25).float()),
    ),
    "weights": ({"slm_policy": "weights", "slm_temperature": 2.0, "slm_weight_floor": 0.1}, soft),
    "kept weights": (
        {"slm_weight": "dft", "slm_weight_normalization": "mean"},
        lambda x: weighted(top(x["loss"] - x["reference_loss"], 0.6), (-x["loss"]).exp()),
    ),
    "positive": (
        {"slm_policy": "positive", "slm_keep_ratio": 0.2, "slm_keep_most": 0.8, "slm_weight": "mile"},
        lambda x: weighted(
            ((x["loss"] > x["reference_loss"]).float() * top(x["loss"] - x["reference_loss"], 0.8)
             + top(x["loss"] - x["reference_loss"], 0.2)).clamp(max=1.0),
            1.0 + x["entropy"],
        ),
    ),
    "quantile": (
        {"slm_policy": "quantile", "slm_score": "loss", "slm_keep_ratio": 0.5, "slm_threshold_decay": 0.75},
        QuantileOracle(),
    ),
}  # fmt: skip


def token_columns(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Full logits to (losses, entropies), [b, s]."""
    log_p = model(inputs).logits.float().log_softmax(-1)
    return -log_p.gather(2, labels[..., None]).squeeze(2), -(log_p.exp() * log_p).sum(-1)


def plain_training(folder: Path, choose: Callable[[dict[str, torch.Tensor]], Chosen]) -> list[list[float]]:
    """(mean trained loss, gradient norm, tokens trained on) of each step."""
    model = LlamaForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    reference = LlamaForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    opened = IndexedCorpus(folder / "corpus")
    samples = PackedSamples(
        opened, 0, opened.num_sequences, sequence_length=SEQ_LENGTH, num_samples=STEPS * BATCH, seed=1234
    )
    report = []
    for step in range(STEPS):
        total, divisor, trained, weight_sum = torch.zeros(()), 0.0, 0, 0.0
        for first in range(step * BATCH, (step + 1) * BATCH, MICRO):
            tokens = torch.stack([torch.from_numpy(samples[i].tokens) for i in range(first, first + MICRO)])
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
            valid = inputs != EOD
            loss, entropy = (column[valid] for column in token_columns(model, inputs, labels))
            with torch.no_grad():
                theirs = [column[valid] for column in token_columns(reference, inputs, labels)]
            weight, part = choose({"loss": loss.detach(), "entropy": entropy.detach(), "reference_loss": theirs[0],
                                   "reference_entropy": theirs[1]})  # fmt: skip
            total = total + (weight * loss).sum()
            divisor, trained, weight_sum = (
                divisor + part,
                trained + int((weight > 0).sum()),
                weight_sum + float(weight.sum()),
            )
        optimizer.zero_grad()
        (total / divisor).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if isinstance(choose, QuantileOracle):
            choose.end_step()
        report.append([float(total.detach()) / weight_sum, float(norm), trained])
    return report


@pytest.mark.parametrize("name", CASES)
def test_selections_equal_plain_pytorch(name: str, folder: Path, tmp_path: Path) -> None:
    changes, choose = CASES[name]
    architecture = dict.fromkeys(
        ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "init_method_std"]
    )
    values = {"reference_load": folder / "reference", **architecture, **changes}
    train(
        folder, tmp_path / "run", **values, init_from=folder / "start", train_iters=STEPS, global_batch_size=BATCH,
        micro_batch_size=MICRO, weight_decay=0.0, lr_decay_style="constant", eod_mask_loss=True,
    )  # fmt: skip
    ours = [[line[column] for column in ("loss", "grad_norm", "kept_tokens")] for line in lines_of(tmp_path / "run")]
    expected = plain_training(folder, choose)
    tolerance = 1e-4 if name == "kept weights" else 2e-5  # weights p pass on the losses' last bits
    assert ours == [pytest.approx(line, rel=tolerance) for line in expected]
    assert len({line[2] for line in expected}) > 1 or name in ("entropy", "weights", "kept weights")


def test_a_running_threshold_does_not_depend_on_how_micro_batches_are_spread(folder: Path, tmp_path: Path) -> None:
    """With weights that stand still the losses have equal bits, and so has the threshold."""
    thresholds = []
    for layout in ("111", "112"):
        train(folder, tmp_path / layout, layout, slm_score="loss", slm_policy="quantile", lr=1e-30, save_interval=3)
        thresholds.append(Manifest.read(tmp_path / layout / "checkpoints" / "step_00000003").state.score_threshold)
    assert thresholds[0] == thresholds[1] is not None


@pytest.mark.parametrize("changes", [{}, {"deepspeed_config": "ds_configs/zero2_bf16.json"}], ids=["stages", "zero 2"])
def test_quantile_and_probe_resume_bit_for_bit(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    layout = "112" if changes else "211"
    common = {
        "reference_load": folder / "reference", "slm_policy": "quantile", "slm_keep_schedule": "linear",
        "slm_keep_warmup_iters": 1, "slm_keep_decay_iters": 3, "slm_probe_interval": 2, "lr_decay_iters": 6, **changes,
    }  # fmt: skip
    straight = train(folder, tmp_path / "straight", layout, **common, train_iters=6)
    train(folder, tmp_path / "resumed", layout, **common, train_iters=3, save_interval=3)
    resumed = train(
        folder, tmp_path / "resumed", layout, **common, train_iters=6, load=tmp_path / "resumed/checkpoints"
    )
    for one, other in zip(straight, resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one["owned"], other["owned"], strict=True))
        assert one["kept"][-len(other["kept"]) :] == other["kept"]
    for event in (None, "probe"):
        assert lines_of(tmp_path / "straight", event) == lines_of(tmp_path / "resumed", event)
    probes = lines_of(tmp_path / "resumed", "probe")
    assert [line["step"] for line in probes] == [2, 4, 6]
    assert [line["agreement"] is None for line in probes] == [True, False, False]
    fractions = [line["keep_fraction"] for line in lines_of(tmp_path / "straight")]
    assert fractions[0] == 1.0
    assert fractions[-1] < 0.9


@pytest.mark.slow
def test_an_adapting_ratio_moves_and_resumes_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    common = {"slm_score": "loss", "slm_keep_adaptation": 5.0, "lr_decay_iters": 6}
    straight = train(folder, tmp_path / "straight", **common, train_iters=6)
    train(folder, tmp_path / "resumed", **common, train_iters=3, save_interval=3)
    resumed = train(folder, tmp_path / "resumed", **common, train_iters=6, load=tmp_path / "resumed/checkpoints")
    assert straight[0]["kept"][-len(resumed[0]["kept"]) :] == resumed[0]["kept"]
    lines = lines_of(tmp_path / "straight")
    assert lines == lines_of(tmp_path / "resumed")
    assert len({line["kept_tokens"] for line in lines}) > 2


@pytest.mark.parametrize("changes", [{}, {"deepspeed_config": "ds_configs/zero3_bf16.json"}], ids=["stages", "zero 3"])
def test_a_probe_changes_nothing_in_training(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    layout = "112" if changes else "211"
    common = {"reference_load": folder / "reference", **changes}
    runs = [
        train(folder, tmp_path / str(interval), layout, slm_probe_interval=interval, **common) for interval in (0, 1)
    ]
    for without, probed in zip(*runs, strict=True):
        for name in ("parameters", "owned"):
            assert all(np.array_equal(a, b) for a, b in zip(without[name], probed[name], strict=True))
        assert without["kept"] == probed["kept"]
        assert np.array_equal(without["rng"], probed["rng"])
    assert lines_of(tmp_path / "0") == lines_of(tmp_path / "1")
    assert lines_of(tmp_path / "0", "probe") == []
    assert [line["step"] for line in lines_of(tmp_path / "1", "probe")] == [1, 2, 3]


@pytest.mark.parametrize("layout", ["111", "212"])
def test_a_probe_compares_with_the_one_before(layout: str, folder: Path, tmp_path: Path) -> None:
    """With weights that stand still, a falling share keeps a part of what it kept: agreement is the ratio."""
    train(
        folder, tmp_path / "run", layout, reference_load=folder / "reference", slm_probe_interval=1, lr=1e-30,
        slm_keep_schedule="linear", slm_keep_decay_iters=4, slm_keep_ratio=0.5, train_iters=5,
    )  # fmt: skip
    probes = lines_of(tmp_path / "run", "probe")
    counts = [4 * math.ceil(32 * ratio) for ratio in (0.875, 0.75, 0.625, 0.5, 0.5)]
    assert [line["kept_tokens"] for line in probes] == counts
    ratios = [after / before for before, after in pairwise(counts)]
    assert [line["agreement"] for line in probes] == [None, *(pytest.approx(x) for x in ratios)]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
