"""Documents in one sample do not see each other: at any layout, in the model and in the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from tests.support.cases import some_by_default
from tests.support.documents import token_losses
from tests.support.runs import VOCAB_SIZE, run_flags, save_hf_llama
from tests.support.scoring import score_here
from tests.support.world import WorldError, run_world

EOD, LENGTH = VOCAB_SIZE - 1, 24
APART = {"reset_attention_mask": True, "reset_position_ids": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "four stages": (4, {"pipeline_model_parallel_size": 4}),
    "two stages, tensor parallel": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "three stages, recomputed, bubble": (3, {
        "pipeline_model_parallel_size": 3, "recompute_granularity": "full", "reference_schedule": "bubble",
    }),
    "zero 2": (2, {"deepspeed_config": "ds_configs/zero2_bf16.json"}),
    "zero 3, recomputed": (2, {"deepspeed_config": "ds_configs/zero3_bf16.json", "recompute_granularity": "full"}),
}  # fmt: skip


def documents(changed: int | None = None) -> list[np.ndarray]:
    """Short documents without an end-of-document token, so that the corpus alone says where they end."""
    generator = np.random.default_rng(3)
    found = [generator.integers(0, EOD, size=int(n)) for n in generator.integers(1, 12, size=120)]
    if changed is not None:
        found[changed] = (found[changed] + 1 + np.arange(found[changed].size)) % EOD
    return found


def write(prefix: Path, changed: int | None = None) -> Path:
    with IndexedCorpusWriter(prefix, np.uint16) as writer:
        for document in documents(changed):
            writer.add_document(document)
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents")
    write(path / "plain")
    write(path / "changed", changed=17)
    save_hf_llama(path / "reference")
    return path


def losses(folder: Path, corpus: str, run_dir: Path, world_size: int, **changes: Any) -> dict[int, dict[str, Any]]:
    common = {
        "objective": "slm", "reference_load": folder / "reference", "seq_length": LENGTH, "train_iters": 2,
        "split": "1,0,0", "lr": 1e-9, "slm_probe_interval": 0, **changes,
    }  # fmt: skip
    seen: dict[int, dict[str, Any]] = {}
    for rank in run_world(token_losses, world_size, run_flags(folder / corpus, run_dir, **common)):
        seen.update(rank)
    return seen


CASES = [
    ("one process", "best-fit"),
    ("four stages", "best-fit"),
    ("sequence parallel", "concatenate"),
    ("zero 2", "concatenate"),
    *(
        pytest.param(layout, "concatenate", marks=pytest.mark.slow)
        for layout in LAYOUTS
        if layout not in ("sequence parallel", "zero 2")
    ),
]


@pytest.mark.parametrize(("layout", "packing"), CASES)
def test_changing_one_document_changes_no_other_losses(folder: Path, tmp_path: Path, layout: str, packing: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    options = {**APART, **parallel, "packing": packing, "train_iters": 4}
    one = losses(folder, "plain", tmp_path / "one", world_size, **options, lr=1e-12, adam_eps=1.0)
    other = losses(folder, "changed", tmp_path / "other", world_size, **options, lr=1e-12, adam_eps=1.0)
    assert one.keys() == other.keys() == set(range(32))
    touched, same = 0, 0
    for sample in range(8):  # the first step: later ones have other weights
        a, b = one[sample], other[sample]
        np.testing.assert_array_equal(a["valid"], b["valid"])
        differs = differing_document(a, b)
        touched += int(differs.any())
        for name in ("loss", "reference"):
            np.testing.assert_array_equal(a[name][~differs], b[name][~differs])
        same += int((~differs & a["valid"]).sum())
    for sample in range(32):  # the reference is frozen, so it can be compared in every step
        differs = differing_document(one[sample], other[sample])
        np.testing.assert_array_equal(one[sample]["reference"][~differs], other[sample]["reference"][~differs])
        touched += int(differs.any())
    assert touched
    assert same > 50


def differing_document(a: dict[str, Any], b: dict[str, Any]) -> np.ndarray:
    """The positions of the documents that hold a differing token, by the boundaries that the loss shows, [s]."""
    ends = np.flatnonzero(~a["valid"])  # the last token of a document has no label
    number = np.searchsorted(ends, np.arange(LENGTH))
    hit = set(number[a["tokens"] != b["tokens"]]) | set(number[a["labels"] != b["labels"]])
    return np.isin(number, list(hit))


def test_without_the_flags_documents_do_see_each_other(folder: Path, tmp_path: Path) -> None:
    one, other = (losses(folder, c, tmp_path / c, 1, train_iters=4) for c in ("plain", "changed"))
    crossed = 0
    for sample in range(32):
        first = np.flatnonzero(one[sample]["tokens"] != other[sample]["tokens"])
        if first.size:
            crossed += int(
                (one[sample]["reference"][first[-1] + 2 :] != other[sample]["reference"][first[-1] + 2 :]).sum()
            )
    assert crossed


@pytest.mark.parametrize(
    "layout",
    some_by_default(["two stages, tensor parallel", "three stages, recomputed, bubble"], "two stages, tensor parallel"),
)
def test_layouts_agree(folder: Path, tmp_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    plain = losses(folder, "plain", tmp_path / "plain", 1, **APART)
    cut = losses(folder, "plain", tmp_path / "cut", world_size, **APART, **parallel)
    for sample, columns in plain.items():
        np.testing.assert_array_equal(columns["valid"], cut[sample]["valid"])
        for name in ("loss", "reference"):
            np.testing.assert_allclose(cut[sample][name], columns[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags", some_by_default([APART, {"reset_attention_mask": True}, {"reset_position_ids": True}], APART), ids=str
)
def test_the_references_losses_are_transformers_with_a_mask(
    folder: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    """Against a Hugging Face model that is given the whole block-diagonal mask and the positions."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "reference", attn_implementation="eager").eval()
    seen = losses(folder, "plain", tmp_path / "run", 1, packing="best-fit", **flags)
    fit = losses(folder, "plain", tmp_path / "fit", 1, packing="best-fit", **APART)
    for sample, columns in seen.items():
        ends = np.flatnonzero(~fit[sample]["valid"])
        number = torch.from_numpy(np.searchsorted(ends, np.arange(LENGTH)))
        position = torch.arange(LENGTH)
        if "reset_position_ids" in flags:
            position = position - torch.tensor([int((number == n).nonzero()[0]) for n in number])
        seen_ss = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if "reset_attention_mask" in flags:
            seen_ss &= number[:, None] == number
        mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen_ss, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(
                torch.from_numpy(columns["tokens"])[None], attention_mask=mask, position_ids=position[None]
            ).logits[0]
        expected = F.cross_entropy(logits, torch.from_numpy(columns["labels"]), reduction="none").numpy()
        valid = columns["valid"]
        np.testing.assert_allclose(columns["reference"][valid], expected[valid], rtol=2e-4, atol=2e-5)
        assert (columns["reference"][~valid] == 0).all()


def test_stored_scores_keep_documents_apart(folder: Path, tmp_path: Path) -> None:
    live = losses(folder, "plain", tmp_path / "live", 1, **APART)
    common = run_flags(
        folder / "plain", tmp_path / "pass", objective="slm", reference_load=folder / "reference", seq_length=LENGTH,
        train_iters=2, split="1,0,0", pipeline_model_parallel_size=3, **APART,
    )  # fmt: skip
    run_world(score_here, 3, {**common, "output": tmp_path / "store"})
    stored = losses(
        folder, "plain", tmp_path / "stored", 2, **APART, reference_load=None, reference_scores=tmp_path / "store",
        pipeline_model_parallel_size=2,
    )  # fmt: skip
    for sample, columns in live.items():
        np.testing.assert_allclose(stored[sample]["reference"], columns["reference"], rtol=2e-5, atol=1e-6)
    with pytest.raises(
        WorldError, match=r"--packing, --reset-attention-mask, --reset-position-ids and --fim-... is 'concatenate, att"
    ):
        losses(folder, "plain", tmp_path / "no", 1, reference_load=None, reference_scores=tmp_path / "store")
