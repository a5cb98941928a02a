"""The text of samples and documents shows exactly what training reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.best_fit import BestFitSamples
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.inspection import Span, document_spans, loss_mask_of, render, sample_spans, summary
from megatron_slm.data.packing import PackedSamples
from megatron_slm.data.preprocessing.documents import DocumentKeys
from megatron_slm.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_slm.data.tokenizers.registry import NullTokenizer
from megatron_slm.errors import ConfigError, CorpusError
from tests.data.corpora import make_corpus

TOKENIZER = NullTokenizer(100)


@pytest.fixture
def corpus(tmp_path: Path) -> IndexedCorpus:
    """60 documents of prompt and response, one of them empty."""
    rows = [{"p": f"{at} 7", "r": "8 " * (at % 5)} for at in range(59)] + [{"p": "", "r": ""}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = DocumentKeys(prompt_key="p", response_key="r")
    config = PreprocessConfig(
        input=(f"{tmp_path}/in.jsonl",), output_prefix=f"{tmp_path}/c", keys=keys, append_eod=True, command="made so"
    )
    preprocess(config, TOKENIZER)
    return IndexedCorpus(tmp_path / "c_sft_document")


@pytest.mark.parametrize("sequence_length", [1, 3, 8, 50])
@pytest.mark.parametrize("kind", [PackedSamples, BestFitSamples])
def test_spans_are_the_samples_of_training(corpus: IndexedCorpus, kind: type, sequence_length: int) -> None:
    mask = loss_mask_of(corpus)
    samples = kind(
        corpus, 0, corpus.num_sequences, sequence_length=sequence_length, num_samples=500 // sequence_length, seed=3,
        loss_mask=mask,
    )  # fmt: skip
    for index in range(len(samples)):
        sample = samples[index]
        spans = sample_spans(corpus, samples.pieces(index), sample.starts, sample.tokens.tolist(), sample.valid)
        np.testing.assert_array_equal(np.concatenate([span.tokens for span in spans]), sample.tokens)
        assert not spans[0].trained[0], "the first token is no label"
        for at, span in enumerate(spans):
            if span.sequence is None:
                assert at == len(spans) - 1
                assert not span.trained.any(), "padding is not trained on"
                continue
            stop = span.offset + span.tokens.size
            np.testing.assert_array_equal(span.tokens, corpus.get(span.sequence, span.offset, span.tokens.size))
            assert span.ends == (stop == corpus.sequence_lengths[span.sequence])
            assert mask is not None
            expected = mask.get(span.sequence, span.offset, span.tokens.size).astype(bool)
            skipped = int(at == 0 or span.offset > 0)  # the first token of a cut document was a label before
            np.testing.assert_array_equal(span.trained[skipped:], expected[skipped:])


def test_documents(corpus: IndexedCorpus) -> None:
    spans = document_spans(corpus, loss_mask_of(corpus), 3)
    assert render(spans, TOKENIZER) == "── sequence 3, tokens [0, 6), 4 trained on, ends here\n⟦3 7⟧8 8 8 100"
    assert document_spans(corpus, None, 59) == []
    with pytest.raises(ConfigError, match=r"--documents is 60: must be in \[0, 60\)"):
        document_spans(corpus, None, 60)


def test_what_is_not_trained_on_is_marked() -> None:
    spans = [
        Span(4, 2, 3, np.array([1, 2, 100]), np.array([False, True, True]), True),
        Span(9, 0, 3, np.array([3, 4, 5]), np.array([False, True, False]), False),
        Span(None, 0, 0, np.array([0, 0]), np.array([False, False]), True),
    ]
    assert render(spans, TOKENIZER).splitlines() == [
        "── sequence 4, tokens [2, 5), 2 trained on, ends here",
        "⟦1⟧2 100",
        "── sequence 9, tokens [0, 3), 1 trained on, continues",
        "⟦3⟧4⟦5⟧",
        "── padding, 2 tokens, 0 trained on",
    ]


def test_summary(corpus: IndexedCorpus, tmp_path: Path) -> None:
    text = summary(corpus, loss_mask_of(corpus))
    assert "60 (1 without a token)" in text
    assert "min 0 / 5 % 3 / median 5 / 95 % 7 / max 7" in text
    trained = sum(at % 5 + 1 for at in range(59))
    assert f"{trained} tokens ({100 * trained / corpus.num_tokens:.1f} %)" in text
    assert "EOD 100" in text
    assert "made so" in text
    assert "none: tokenizer and hashes" in summary(make_corpus(tmp_path / "m", [3]), None)


def test_a_mask_of_another_corpus(corpus: IndexedCorpus, tmp_path: Path) -> None:
    make_corpus(tmp_path / "c_sft_document_loss_mask", [corpus.num_tokens], dtype="uint8", vocab_size=2)
    with pytest.raises(CorpusError, match="must hold one uint8 for every token of"):
        loss_mask_of(corpus)
    (tmp_path / "c_sft_document_loss_mask.idx").unlink()
    with pytest.raises(CorpusError, match=r"\.meta\.json: loss_mask is .*does not exist"):
        loss_mask_of(corpus)
