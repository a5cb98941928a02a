"""References with another tokenizer: the same store where it is the same, and the text's losses where it is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_slm.cli.score import parse_scoring
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.packing import PackedSamples
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_slm.data.tokenizers.registry import HuggingFaceTokenizer
from megatron_slm.errors import ScoreStoreError, SlmError
from megatron_slm.reference.manifest import StoreManifest
from megatron_slm.scoring.plan import make_scoring_plan
from megatron_slm.scoring.retokenized import RetokenizedSamples
from tests.data.byte_level import byte_level
from tests.data.texts import TEXTS, mixtures
from tests.support.runs import MODEL_FLAGS, flags, run_flags, save_hf_llama, write_corpus
from tests.support.scoring import score_here, stored
from tests.support.world import run_world


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_the_same_tokenizer_gives_the_same_store(packing: str, tmp_path: Path) -> None:
    """Bit for bit, and with the same identity: whole runs read either."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {
        "objective": "slm",
        "train_iters": 2,
        "reference_load": reference,
        "packing": packing,
        "eod_mask_loss": True,
    }
    run_world(both_passes, 1, run_flags(corpus, tmp_path / "run", **common), str(tmp_path))
    plain, retokenized = (StoreManifest.read(tmp_path / name) for name in ("plain", "retokenized"))
    assert torch.equal(stored(tmp_path / "plain"), stored(tmp_path / "retokenized"))
    assert float(stored(tmp_path / "plain").abs().sum()) > 0
    assert plain.store_id == retokenized.store_id
    assert plain.shards == retokenized.shards


def both_passes(values: dict[str, Any], folder: str) -> None:
    score_here({**values, "output": f"{folder}/plain"})
    score_here({**values, "output": f"{folder}/retokenized", "retokenize": True})


class _Samples:
    """The part of `BlendedSamples` that is read here, for one corpus."""

    def __init__(self, samples: PackedSamples) -> None:
        self.sources, self.sequence_length, self.name = [samples], samples.sequence_length, "corpus"
        self._samples = samples

    def locate(self, index: int) -> tuple[int, int]:
        return 0, index

    def __len__(self) -> int:
        return len(self._samples)


def folder_of(folder: Path, vocab_size: int) -> Path:
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=byte_level(vocab_size), eos_token=end).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in large byte-level tokens, and a reference of small ones."""
    path = tmp_path_factory.mktemp("retokenized")
    tokenizer = HuggingFaceTokenizer(folder_of(path / "tokenizer", 600))
    save_hf_llama(path / "reference", vocab_size=320, max_position_embeddings=512)
    folder_of(path / "reference", 300)
    texts = [text for text in TEXTS if tokenizer.encode(text)] * 3
    (path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(
        PreprocessConfig(input=(str(path / "in.jsonl"),), output_prefix=str(path / "c"), append_eod=True), tokenizer
    )
    return path


def retokenized(folder: Path, length: int, reference_length: int) -> tuple[RetokenizedSamples, PackedSamples, Any]:
    corpus = IndexedCorpus(folder / "c_text_document")
    samples = PackedSamples(corpus, 0, corpus.num_sequences, sequence_length=length, num_samples=None, seed=3)
    own, theirs = HuggingFaceTokenizer(folder / "tokenizer"), HuggingFaceTokenizer(folder / "reference")
    own.special_tokens_are_plain = theirs.special_tokens_are_plain = True
    made = RetokenizedSamples(
        _Samples(samples), tokenizer=own, reference=theirs, special={own.eod_id: theirs.eod_id}, sequence_length=reference_length
    )  # fmt: skip
    return made, samples, theirs


def test_the_reference_reads_the_text_and_its_losses_keep_their_sum(folder: Path) -> None:
    made, samples, theirs = retokenized(folder, 48, 160)
    own = HuggingFaceTokenizer(folder / "tokenizer")
    generator = np.random.default_rng(4)
    for index in range(len(samples)):
        sample, tokens = made[index], samples[index].tokens
        text, whole = theirs.decode(sample.tokens[: sample.starts[-1]].tolist()), own.decode(tokens.tolist())
        assert whole.strip("\ufffd") in text
        losses = generator.exponential(2.0, made.sequence_length).astype(np.float32)
        found = made.spread(index, losses)
        assert found.shape == (48,)
        total, used = math.fsum(found.tolist()), math.fsum(losses[: sample.starts[-1] - 1].tolist())
        assert total <= used * (1 + 1e-6)  # what lies outside of the sample is left out
        if text == whole and tokens[0] == sample.tokens[0] and len(theirs.decode([tokens[0]])) == 1:
            assert total == pytest.approx(used, rel=1e-6)


def test_too_long_a_sample_is_named(folder: Path) -> None:
    made, _, _ = retokenized(folder, 48, 48)
    with pytest.raises(
        ScoreStoreError, match=r"sample 0: tokens of the reference's tokenizer is \d+: must be at most 49"
    ):
        made[0]


def test_a_corpus_of_another_tokenizer_is_named(folder: Path) -> None:
    made, _, theirs = retokenized(folder, 48, 160)
    made._tokenizer = theirs
    with pytest.raises(ScoreStoreError, match=r"text of sequence \d+ is .*: must have the tokens of the corpus under"):
        made[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"reference_load": "{folder}/bare"}, r"tokenizer of --reference-load .*bare is missing: required by --retokenize"),
    "fewer rows than tokens": ({"reference_load": "{folder}/fewer"}, r"--reference-load: vocabulary size is 299: must be at least its tokenizer's 301"),
    "no end of documents": ({"reference_load": "{folder}/endless"}, r"--reference-load: end-of-document token is 'none': must exist, for --retokenize"),
    "uneven for sequence parallelism": ({"reference_seq_length": 161, "tensor_model_parallel_size": 2, "sequence_parallel": True}, r"--reference-seq-length is 161: must be a multiple of --tensor-model-parallel-size"),
    "uneven for context parallelism": ({"reference_seq_length": 162, "context_parallel_size": 2}, r"--reference-seq-length is 162: must be a multiple of 2 x --context-parallel-size, 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_retokenized_is_named(name: str, folder: Path) -> None:
    changes, message = REFUSED[name]
    if name == "no tokenizer":
        save_hf_llama(folder / "bare", vocab_size=320)
    elif name == "fewer rows than tokens":
        folder_of(save_hf_llama(folder / "fewer", vocab_size=299), 300)
    elif name == "no end of documents":
        fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(300))
        fast.save_pretrained(str(save_hf_llama(folder / "endless", vocab_size=320)))
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    model = dict.fromkeys(name.replace("-", "_") for name in MODEL_FLAGS)
    common = {"reference_load": folder / "reference", "retokenize": True, "output": folder / "store", **model}
    values = run_flags(
        folder / "c_text_document", folder / "run", objective="slm", vocab_size=None, seq_length=48,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder / "tokenizer", **{**common, **changes},
    )  # fmt: skip
    config, options, _ = parse_scoring(flags(values))
    with pytest.raises(SlmError, match=message):
        make_scoring_plan(config, options, 2)


@pytest.mark.slow
def test_a_pass_at_any_layout_is_plain_pytorch(folder: Path) -> None:
    """Losses of transformers on the reference's tokens, spread over the run's."""
    model = dict.fromkeys(name.replace("-", "_") for name in MODEL_FLAGS)
    values = run_flags(
        folder / "c_text_document", folder / "run", objective="slm", train_iters=1, **model, vocab_size=None,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder / "tokenizer", seq_length=48,
        reference_load=folder / "reference", retokenize=True, reference_seq_length=160, seed=3,
    )  # fmt: skip
    run_world(score_here, 1, {**values, "output": folder / "one"})
    layout = {"pipeline-model-parallel-size": 2, "tensor-model-parallel-size": 2, "sequence-parallel": True}
    run_world(score_here, 4, {**values, **layout, "output": folder / "four"})
    made = retokenized(folder, 48, 160)[0]
    reference = LlamaForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32).eval()
    expected = []
    for index in range(8):
        tokens = torch.from_numpy(made[index].tokens)
        with torch.no_grad():
            logits = reference(tokens[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()
        expected.append(torch.from_numpy(made.spread(index, losses)))
    torch.testing.assert_close(stored(folder / "one"), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored(folder / "four"), stored(folder / "one"), rtol=1e-5, atol=1e-5)


def split_at(tokens: list[int], losses: list[float], end: int) -> list[tuple[list[int], list[float]]]:
    """Each document's tokens, its last one the end, and their losses; what is left at the end is no whole document."""
    stops = [i + 1 for i, token in enumerate(tokens) if token == end]
    starts = [0, *stops[:-1]]
    return [(tokens[i:j], losses[i:j]) for i, j in zip(starts, stops, strict=True)]


@pytest.mark.slow
def test_a_pass_preserves_the_sums_of_a_thousand_documents(tmp_path: Path) -> None:
    """Texts in many scripts, preprocessed and scored by the tools; the sums are transformers' on the reference's tokens.

    Documents are packed whole; the first of a sample is left out, since its first token is no label.
    """
    own, theirs = (
        HuggingFaceTokenizer(folder_of(tmp_path / name, size)) for name, size in (("own", 600), ("ref", 300))
    )
    texts = [text for text in mixtures(1300) if own.encode(text)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    inputs = PreprocessConfig(input=(str(tmp_path / "in.jsonl"),), output_prefix=str(tmp_path / "c"), append_eod=True)
    preprocess(inputs, own)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 1536}
    reference = LlamaForCausalLM.from_pretrained(save_hf_llama(tmp_path / "ref", vocab_size=320, **tiny)).eval()
    model = dict.fromkeys(name.replace("-", "_") for name in MODEL_FLAGS)
    values = run_flags(
        tmp_path / "c_text_document", tmp_path / "run", objective="slm", train_iters=34, **model, vocab_size=None,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tmp_path / "own", seq_length=512, packing="best-fit",
        reference_load=tmp_path / "ref", retokenize=True, reference_seq_length=1535, output=tmp_path / "store",
    )  # fmt: skip
    run_world(score_here, 1, values)
    config, options, _ = parse_scoring(flags(values))
    plan = make_scoring_plan(config, options, 1)
    rows, seen = stored(tmp_path / "store"), set()
    for index, row in enumerate(rows):
        inside = plan.retokenized[index]
        tokens = torch.from_numpy(inside.tokens[: inside.starts[-1]])
        with torch.no_grad():
            logits = reference(tokens[None, :-1]).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").tolist()
        expected = split_at(tokens.tolist(), [0.0, *losses], theirs.eod_id)
        found = split_at(plan.samples[index].tokens.tolist(), [0.0, *row.tolist()], own.eod_id)
        assert len(expected) == len(found)
        for (_, wanted), (document, spread) in list(zip(expected, found, strict=True))[1:]:
            assert math.fsum(spread) == pytest.approx(math.fsum(wanted), rel=1e-5)
            seen.add(tuple(document))
    assert len(seen) >= 1000
