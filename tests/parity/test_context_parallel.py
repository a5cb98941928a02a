"""Sequences that are cut over ranks train as whole ones in one process: losses, gradient norms and the kept tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from tests.support.context import Kept, train_in_turn
from tests.support.runs import VOCAB_SIZE, recorded, run_flags, save_hf_llama, zero_config
from tests.support.scoring import score_here
from tests.support.world import run_world

LENGTH = 24
SECONDS_OF_A_RANK = 4.0
"""Longest that a rank may take for a run, if the ranks had one core."""
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
WINDOW = {"window_size": 7}
SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ZERO_3 = {"deepspeed_config": zero_config(3)}
Runs = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""By name: the flags that change what is trained, and those of the layout."""

QUICK: Runs = {  # in a world of four
    "c4-zero3-documents-window": (DOCUMENTS | WINDOW, {"context_parallel_size": 4, **ZERO_3}),
    "c2-tp2-sp-documents": (DOCUMENTS, {"context_parallel_size": 2, **SEQUENCE_PARALLEL}),
    "c2-pp2-window": (WINDOW, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
MORE: Runs = {
    "c2-dp2-zero3-together": (  # what two data ranks rank together, one ranks in a micro-batch of twice the size
        {"micro_batch_size": 4},
        {"context_parallel_size": 2, "slm_scope": "data-parallel", "micro_batch_size": 2, **ZERO_3},
    ),
}


def write(prefix: Path, *, seed: int = 3, count: int = 60) -> Path:
    """Documents of 1 to 40 tokens: at 4 ranks a stretch has 3, so that most documents lie in several."""
    generator = np.random.default_rng(seed)
    with IndexedCorpusWriter(prefix, np.uint16) as writer:
        for size in generator.integers(1, 40, size=count):
            tokens = generator.integers(0, VOCAB_SIZE - 1, size=int(size))
            writer.add_document(np.append(tokens, VOCAB_SIZE - 1))
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context")
    write(path / "corpus")
    write(path / "held_out", seed=5, count=4)
    save_hf_llama(path / "reference")
    return path


def values(folder: Path, run_dir: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    common: dict[str, Any] = {
        "objective": "slm", "reference_load": folder / "reference", "seq_length": LENGTH, "qk_layernorm": True,
        "valid_data_path": [f"held={folder / 'held_out'}"], "split": "1,0,0",
        "adam_eps": 1e-3,  # Adam would make whole steps of what rounding makes of zeros, and quantiles are of one token
    }  # fmt: skip
    for change in changes:
        common |= change
    return run_flags(folder / "corpus", run_dir, **common)


def train(world: int, runs: Sequence[dict[str, Any]]) -> list[Kept]:
    """Train runs in one world; the tokens that its ranks together kept in each."""
    seconds = 60 + SECONDS_OF_A_RANK * world * len(runs)  # the ranks share the cores
    reports = run_world(train_in_turn, world, list(runs), timeout_seconds=seconds)
    return [set.union(*parts) for parts in zip(*reports, strict=True)]


class Plain:
    """Runs in one process, each trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, tuple[Path, Kept]] = {}

    def train(self, kinds: Iterable[dict[str, Any]]) -> None:
        new = {str(what): what for what in kinds if str(what) not in self.found}
        dirs = [self.folder / "plain" / str(len(self.found) + number) for number in range(len(new))]
        runs = [values(self.folder, run_dir, what) for run_dir, what in zip(dirs, new.values(), strict=True)]
        kept = train(1, runs) if runs else []
        self.found |= dict(zip(new, zip(dirs, kept, strict=True), strict=True))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def check(plain: Plain, out: Path, runs: Runs, world: int) -> None:
    """Every run of a world against its own in one process."""
    cut = [values(plain.folder, out / name, what, layout) for name, (what, layout) in runs.items()]
    plain.train(what for what, _ in runs.values())
    for (name, (what, _)), mine, kept in zip(runs.items(), cut, train(world, cut), strict=True):
        run_dir, expected = plain.found[str(what)]
        assert_same_lines(mine["run-dir"], run_dir, name)
        assert kept == expected, name
        assert 100 < len(kept) < 5 * 8 * LENGTH or what in KEEP_ALL, name


def assert_same_lines(found: Path, expected: Path, name: str) -> None:
    """All metrics: losses, counts, quantiles of scores, gradient norms, and an evaluation."""
    lines, wanted = recorded(found), recorded(expected)
    assert len(lines) == len(wanted) >= 6  # five steps and an evaluation, or more
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for metric, value in other.items():
            if metric.startswith("score_p") and name.endswith("together"):
                continue  # quantiles are of micro-batches, which differ in size
            if isinstance(value, float):
                # differences of losses of some nats: 1e-5 of these
                absolute = 2e-5 if metric.startswith(("score", "excess", "threshold")) else 2e-6
                assert line[metric] == pytest.approx(value, rel=1e-5, abs=absolute), (name, metric, other.get("step"))
            else:
                assert line[metric] == value, (name, metric)


def test_cut_sequences_train_as_whole_ones(plain: Plain, tmp_path: Path) -> None:
    check(plain, tmp_path, QUICK, 4)


@pytest.mark.slow
def test_tokens_of_several_data_ranks_are_ranked_together(plain: Plain, tmp_path: Path) -> None:
    check(plain, tmp_path, MORE, 4)


LAYOUTS = list(itertools.product((2, 4), (1, 2), (1, 2), (1, 2)))
"""Context-parallel, tensor-parallel ranks, stages and data-parallel ranks."""


def of_layout(context: int, tensor: int, pipeline: int, data: int) -> Runs:
    """Documents and windows, on and off, at the ZeRO stages that there are."""
    layout: dict[str, Any] = {"context_parallel_size": context, "pipeline_model_parallel_size": pipeline}
    layout |= SEQUENCE_PARALLEL if tensor == 2 else {}
    runs: Runs = {}
    for documents, window, stage in itertools.product((False, True), (False, True), (1, 3)):
        if stage == 1 or pipeline == 1:
            name = f"zero{stage}{'-documents' * documents}{'-window' * window}"
            what = {**(DOCUMENTS if documents else {}), **(WINDOW if window else {})}
            runs[name] = what, {**layout, "deepspeed_config": zero_config(stage)}
    return runs


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("context", "tensor", "pipeline", "data"), LAYOUTS)
def test_every_layout(plain: Plain, tmp_path: Path, context: int, tensor: int, pipeline: int, data: int) -> None:
    check(plain, tmp_path, of_layout(context, tensor, pipeline, data), context * tensor * pipeline * data)


KEEP_ALL: list[dict[str, Any]] = [
    {"slm_policy": "weights", "slm_temperature": 0.7},
    {"objective": "clm", "reference_load": None},
]
"""What keeps every token."""
SELECTIONS: Runs = {
    name: (what, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2})
    for name, what in {
        "sequence": {"slm_scope": "sequence"},
        "quantile": {"slm_policy": "quantile"},
        "sample": {"slm_policy": "sample"},
        "weights": KEEP_ALL[0],
        "peaking": {"slm_policy": "peaking", "slm_scope": "sequence"},
        "kl": {"loss": "kl"},
        "recomputed": {"recompute_granularity": "full"},
        "probed": {"slm_probe_interval": 2},
        "clm": KEEP_ALL[1],
        "own loss": {"reference_load": None, "slm_score": "loss"},
    }.items()
}


@pytest.mark.slow
def test_every_selection(plain: Plain, tmp_path: Path) -> None:
    check(plain, tmp_path, SELECTIONS, 4)


def assert_same_stores(found: Path, expected: Path) -> None:
    """The same losses up to rounding, and the same ids."""
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names == sorted(path.name for path in found.glob("*.safetensors"))
    for name in names:
        mine, theirs = load_file(found / name), load_file(expected / name)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if value.is_floating_point():
                assert torch.allclose(mine[key].float(), value.float(), rtol=2e-3, atol=1e-3), (name, key)
            elif key != "score_digest":  # of the losses' bits
                assert torch.equal(mine[key], value), (name, key)


@pytest.mark.slow
def test_scores_stored_at_another_size(folder: Path, plain: Plain, tmp_path: Path) -> None:
    scoring = values(folder, tmp_path / "scoring", DOCUMENTS, {"output": tmp_path / "scores", "top_logprobs": 5})
    run_world(score_here, 1, scoring)
    cut = {"output": tmp_path / "cut", "context_parallel_size": 2, "pipeline_model_parallel_size": 2}
    run_world(score_here, 4, {**scoring, **{name.replace("_", "-"): value for name, value in cut.items()}})
    assert_same_stores(tmp_path / "cut", tmp_path / "scores")
    what = {**DOCUMENTS, "reference_load": None, "reference_scores": [tmp_path / "scores"]}
    check(
        plain,
        tmp_path,
        {
            "stored": (what, {"context_parallel_size": 4}),
            "stored-flat": (what, {"context_parallel_size": 4, "deepspeed_config": zero_config(2)}),
        },
        4,
    )
