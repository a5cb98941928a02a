"""Documents to token arrays: sequences, empties, ends of documents and loss masks, against a loop in plain Python."""

from __future__ import annotations

import random

import pytest

from megatron_slm.data.preprocessing.documents import DocumentKeys, Texts
from megatron_slm.data.preprocessing.encoding import EncodedDocuments, Encoding, encode_documents
from megatron_slm.data.tokenizers.registry import NullTokenizer

TOKENIZER = NullTokenizer(100)
PLAIN, MASKED = DocumentKeys(), DocumentKeys(loss_mask_key="m")


def as_lists(encoded: EncodedDocuments) -> tuple:
    """For comparing."""
    return tuple(None if field is None else field.tolist() for field in encoded[:4])


def by_hand(documents: list[Texts], encoding: Encoding) -> tuple:
    """Encode one document at a time, by the rules."""
    tokens: list[int] = []
    mask: list[int] = []
    lengths, counts = [], []
    for document in documents:
        sequences = [TOKENIZER.encode(text) for text in document.texts]
        bits = [1] * sum(map(len, sequences))
        end = 1
        if document.trained is not None:
            bits = [bit for ids, bit in zip(sequences, document.trained, strict=True) for _ in ids]
            end = document.trained[-1] if document.trained else 1
            sequences = [[token for ids in sequences for token in ids]]
        sequences = [ids for ids in sequences if ids]
        if sequences and encoding.eod_id is not None:
            sequences[-1].append(encoding.eod_id)
            bits.append(end)
        if sequences and encoding.bos_id is not None:
            sequences[0].insert(0, encoding.bos_id)
            bits.insert(0, 0)
        tokens += [token for ids in sequences for token in ids]
        mask += bits
        lengths += map(len, sequences)
        counts.append(len(sequences))
    return tokens, lengths, counts, mask if encoding.keys.is_masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ends", [(None, None), (None, 100), (99, None), (99, 100)])
def test_random_documents(masked: bool, ends: tuple[int | None, int | None]) -> None:
    draw = random.Random(0)
    encoding = Encoding(keys=MASKED if masked else PLAIN, bos_id=ends[0], eod_id=ends[1])
    for _ in range(100):
        documents = []
        for _ in range(draw.randrange(6)):
            texts = [
                " ".join(str(draw.randrange(90)) for _ in range(draw.choice((0, 0, 1, 2, 5))))
                for _ in range(draw.randrange(4))
            ]
            documents.append(Texts(texts, [draw.randrange(2) for _ in texts] if masked else None))
        assert as_lists(encode_documents(documents, encoding, TOKENIZER)) == by_hand(documents, encoding)


def test_prompts_are_not_trained_on_and_the_end_is() -> None:
    encoding = Encoding(keys=DocumentKeys(prompt_key="p", response_key="r"), bos_id=99, eod_id=100)
    documents = [Texts(["1 2", "3"], [0, 1]), Texts(["", ""], [0, 1]), Texts(["9", ""], [0, 1])]
    encoded = encode_documents(documents, encoding, TOKENIZER)
    assert encoded.tokens.tolist() == [99, 1, 2, 3, 100, 99, 9, 100]
    assert encoded.loss_mask is not None
    assert encoded.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert encoded.sequences_per_document.tolist() == [1, 0, 1]
