"""Fill-in-the-middle as Megatron does it: taken apart, a document gives its text back; rates are those asked for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_slm.config.fill_in_middle import FillInMiddleConfig
from megatron_slm.data.fill_in_middle import FillInMiddle
from megatron_slm.data.loader import Boundaries, MicroBatchSource
from megatron_slm.data.reading import Sample
from megatron_slm.data.tokenizers.registry import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_slm.errors import ConfigError
from tests.data.byte_level import END, byte_level_folder
from tests.data.texts import CODE, PROSE, SCRIPTS

NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
TEXTS = (*PROSE, *CODE, *SCRIPTS, "x", "  ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    return HuggingFaceTokenizer(byte_level_folder(folder, special=(*NAMES, "<file>", "<begin>"), bos="<begin>"))


def ids_of(tokenizer: Tokenizer, *names: str) -> list[int]:
    found = [tokenizer.id_of(name) for name in names]
    assert None not in found
    return [index for index in found if index is not None]


def turner(tokenizer: Tokenizer, *, seed: int = 1, **settings: Any) -> FillInMiddle:
    given = FillInMiddleConfig(fim_data=True, **settings)
    return FillInMiddle(given, tokenizer, eod_id=tokenizer.eod_id, seed=seed)


def sample_of(pieces: list[list[int]], length: int) -> Sample:
    """A sample of pieces of a corpus, and padding up to `length` inputs."""
    ids = [index for piece in pieces for index in piece][: length + 1]
    tokens = np.zeros(length + 1, np.int64)
    tokens[: len(ids)] = ids
    starts = [start for start in np.cumsum([len(piece) for piece in pieces]).tolist() if start <= length]
    return Sample(tokens, np.arange(1, length + 1) < len(ids), np.array(starts, np.int64))


def documents(tokens: np.ndarray, end: int) -> list[list[int]]:
    """Documents without the tokens that end them; what is behind the last one is not looked at."""
    ends = np.flatnonzero(tokens == end).tolist()
    return [tokens[first:last].tolist() for first, last in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


class Parts(NamedTuple):
    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    suffix_first: bool


def taken_apart(ids: list[int], tokenizer: Tokenizer) -> Parts | None:
    """The parts of a document as the format says: P prefix S suffix M middle, or P S suffix M prefix middle.

    In the second, nothing tells where the prefix ends; prefix and middle come as the prefix.
    """
    begin, middle, suffix, _ = ids_of(tokenizer, *NAMES)
    if begin not in ids:
        assert middle not in ids
        assert suffix not in ids
        return None
    assert ids[0] == begin
    assert [ids.count(index) for index in (begin, middle, suffix)] == [1, 1, 1]
    at, second = ids.index(suffix), ids.index(middle)
    assert at < second
    if at == 1:
        return Parts(ids[second + 1 :], [], ids[2:second], True)
    return Parts(ids[1:at], ids[second + 1 :], ids[at + 1 : second], False)


@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_a_document_taken_apart_gives_its_text_back(tokenizer: HuggingFaceTokenizer, spm_rate: float) -> None:
    [end], [pad] = ids_of(tokenizer, END), ids_of(tokenizer, NAMES[3])
    pieces = [[*tokenizer.encode(text), end] for text in TEXTS]
    sample, turn = sample_of(pieces, 1000), turner(tokenizer, fim_rate=1.0, fim_spm_rate=spm_rate)
    orders = set()
    for number in range(12):
        turned = turn(sample, number)
        found = documents(turned.tokens, end)
        for text, ids in zip(TEXTS, found, strict=True):
            parts = taken_apart(ids, tokenizer)
            assert parts is not None
            texts = [tokenizer.decode(part) for part in parts[:3]]
            assert "".join(texts) == text
            if not parts.suffix_first:  # an empty prefix looks like the other order
                assert [tokenizer.encode(part) for part in texts] == [*parts[:3]], "each is tokenized by itself"
            orders.add(parts.suffix_first)
        filled = sum(len(ids) + 1 for ids in found)
        begins = np.cumsum([len(ids) + 1 for ids in found])
        assert turned.starts.tolist() == begins.tolist(), "documents begin where they were moved to; then padding"
        assert (turned.tokens[filled:] == pad).all()
        np.testing.assert_array_equal(turned.valid, np.arange(1, 1001) < filled)
    assert orders == ({True} if spm_rate == 1.0 else {True, False})


def test_rates_and_cuts_over_many_samples(tokenizer: HuggingFaceTokenizer) -> None:
    """Within four standard deviations; both cuts are uniform over all places, the ends included."""
    [end], count = ids_of(tokenizer, END), 1200
    sample = sample_of([[*tokenizer.encode("def f(x)"), end]], 40)
    turn = turner(tokenizer, fim_rate=0.7, fim_spm_rate=0.3)
    plain, first, places = 0, 0, np.zeros((9, 9))
    for number in range(count):
        parts = taken_apart(documents(turn(sample, number).tokens, end)[0], tokenizer)
        if parts is None:
            plain += 1
        elif parts.suffix_first:
            first += 1
        else:
            prefix, middle = (len(tokenizer.decode(part)) for part in parts[:2])
            places[prefix, prefix + middle] += 1
    # an empty prefix looks like the other order, so those rows are left out
    turned = count - plain
    assert abs(turned / count - 0.7) < 4 * np.sqrt(0.7 * 0.3 / count)
    empty = 17 / 81  # the least of two of nine places is 0
    share = 0.3 + 0.7 * empty
    assert abs(first / turned - share) < 4 * np.sqrt(share * (1 - share) / turned)
    seen = places[1:, 1:]
    expected = np.triu(np.full((8, 8), 2.0)) - np.eye(8)
    expected *= seen.sum() / expected.sum()
    assert (seen[np.tril_indices(8, -1)] == 0).all()
    for axis in range(2):
        found, wanted = seen.sum(axis), expected.sum(axis)
        assert (np.abs(found - wanted) < 4 * np.sqrt(wanted)).all(), (axis, found, wanted)


def test_a_sample_keeps_its_length(tokenizer: HuggingFaceTokenizer) -> None:
    """What no longer fits is cut off at its end; its labels all count."""
    pieces = [[*tokenizer.encode(text), *ids_of(tokenizer, END)] for text in TEXTS[:3]]
    turn = turner(tokenizer, fim_rate=1.0)
    short = sample_of(pieces, sum(map(len, pieces)) - 1)
    assert short.valid.all()
    for number in range(10):
        turned, roomy = turn(short, number), turn(sample_of(pieces, 300), number)
        np.testing.assert_array_equal(turned.tokens, roomy.tokens[: short.tokens.size])
        assert turned.valid.all()
        assert turned.starts.tolist() == roomy.starts[roomy.starts < short.tokens.size].tolist()


def test_documents_without_a_turn_stay_as_they_are(tokenizer: HuggingFaceTokenizer) -> None:
    """To the token, with what their labels count; a sample without any turned document is the very same."""
    [end] = ids_of(tokenizer, END)
    pieces = [[end], [*tokenizer.encode(CODE[0]), end], [end], [*tokenizer.encode(PROSE[0]), end]]
    sample = sample_of(pieces, 200)
    sample.valid[len(pieces[0]) - 1] = False  # as where packing overlaps by a token
    assert turner(tokenizer, fim_rate=0.0)(sample, 3) is sample
    turn = turner(tokenizer, fim_rate=1.0, fim_no_prefix="def mean")
    for number in range(5):
        turned = turn(sample, number)
        first, one, two, last = documents(turned.tokens, end)
        assert (first, one, two) == ([], pieces[1][:-1], [])
        assert taken_apart(last, tokenizer) is not None
        assert turned.valid[: len(pieces[1]) + 2].tolist() == sample.valid[: len(pieces[1]) + 2].tolist()


def test_fragments_of_a_document(tokenizer: HuggingFaceTokenizer) -> None:
    [end], [file] = ids_of(tokenizer, END), ids_of(tokenizer, "<file>")
    fragments = [tokenizer.encode(text) for text in CODE]
    repository = [file, *fragments[0], file, *fragments[1], file, file, *fragments[2], end]
    sample = sample_of([repository, [*tokenizer.encode(PROSE[0]), end]], 400)
    turn = turner(tokenizer, fim_rate=0.5, fim_split_sample="<file>", fim_fragment_rate=0.9)
    left, turned, alone, count = 0, 0, 0, 400
    for number in range(count):
        one, other = documents(turn(sample, number).tokens, end)
        alone += taken_apart(other, tokenizer) is not None
        left += one == repository[:-1]
        ends = [-1, *np.flatnonzero(np.array(one) == file).tolist(), len(one)]
        parts = [one[first + 1 : last] for first, last in itertools.pairwise(ends)]
        assert [bool(part) for part in parts] == [False, True, True, False, True]
        for part, text, ids in zip([parts[1], parts[2], parts[4]], CODE, fragments, strict=True):
            apart = taken_apart(part, tokenizer)
            turned += apart is not None
            assert part == ids if apart is None else "".join(map(tokenizer.decode, apart[:3])) == text
    for share, expected, trials in (
        (alone / count, 0.5, count),
        (left / count, 0.5 + 0.5 * 0.1**3, count),
        (turned / count / 3, 0.5 * 0.9, count),
    ):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / trials)


def test_a_document_without_a_turned_fragment_stays_as_it_is(tokenizer: HuggingFaceTokenizer) -> None:
    [file] = ids_of(tokenizer, "<file>")
    sample = sample_of([[*tokenizer.encode(CODE[0]), file, *tokenizer.encode(CODE[1])]], 200)
    turn = turner(tokenizer, fim_rate=1.0, fim_split_sample="<file>", fim_fragment_rate=0.0)
    assert turn(sample, 3) is sample


def test_special_tokens_stay_and_none_is_read_from_text(tokenizer: HuggingFaceTokenizer) -> None:
    [end, file, begin] = ids_of(tokenizer, END, "<file>", "<begin>")
    spelled = HuggingFaceTokenizer(tokenizer._path)
    spelled.special_tokens_are_plain = True
    text = "a <fim_middle> b <begin> c"
    ids = [begin, *spelled.encode(text), file, *spelled.encode("d <file>"), end]
    turn = turner(tokenizer, fim_rate=1.0)
    for number in range(40):
        [found] = documents(turn(sample_of([ids], 150), number).tokens, end)
        assert found[0] == begin, "before everything else"
        parts = taken_apart(found[1:], tokenizer)
        assert parts is not None
        joined = [*parts.prefix, *parts.middle, *parts.suffix]
        assert joined.count(file) == 1
        assert tokenizer.decode(joined) == f"{text}<file>d <file>"
    assert tokenizer.special_tokens_are_plain is False, "the run's own is another"


def test_characters_that_a_sample_cuts_in_two_are_whole_again(tokenizer: HuggingFaceTokenizer) -> None:
    rare = "龘"
    whole = tokenizer.encode(rare + SCRIPTS[0] + rare)
    assert len(tokenizer.encode(rare)) == 3, "no character of the tokenizer's"
    turn = turner(tokenizer, fim_rate=1.0)
    for first, last in ((1, 0), (2, 1), (0, 2), (0, 0)):
        ids = whole[first : len(whole) - last]
        assert tokenizer.decode(ids)[:1] == ("\N{REPLACEMENT CHARACTER}" if first else rare)
        for number in range(20):
            turned = turn(sample_of([ids], 200), number)
            parts = taken_apart(turned.tokens[: turned.starts[-1]].tolist(), tokenizer)
            assert parts is not None
            joined = [*whole[:first], *parts.prefix, *parts.middle, *parts.suffix, *whole[len(whole) - last :]]
            assert tokenizer.decode(joined) == tokenizer.decode(whole)


def test_a_sentencepiece_model(model_file: Path) -> None:
    """Its parts begin with a space of its own, as in Megatron, so each part's text is compared by itself."""
    tokenizer = SentencePieceTokenizer(model_file)
    assert tokenizer.eod_id is not None
    table = tokenizer.token_table()
    own = {f"fim_{name}_token": table[-1 - at] for at, name in enumerate(("prefix", "middle", "suffix", "pad"))}
    turn = turner(tokenizer, fim_rate=1.0, fim_spm_rate=0.0, **own)
    marks = [index for index in range(len(table) - 3, len(table))]
    text = PROSE[0]
    assert not set(tokenizer.encode(text)) & set(marks)
    for number in range(20):
        turned = turn(sample_of([[*tokenizer.encode(text), tokenizer.eod_id]], 400), number)
        ids = turned.tokens[: turned.starts[-1] - 1].tolist()
        begin, at, second = ids.index(marks[2]), ids.index(marks[0]), ids.index(marks[1])
        parts = ids[begin + 1 : at], ids[second + 1 :], ids[at + 1 : second]
        assert "".join(map(tokenizer.decode, parts)) == text


def test_every_way_of_reading_draws_the_same(tokenizer: HuggingFaceTokenizer) -> None:
    """By a fresh object, in any order, again; other samples, seeds and sets draw other numbers."""
    sample = sample_of([[*tokenizer.encode(text), *ids_of(tokenizer, END)] for text in TEXTS], 400)
    turn = turner(tokenizer)
    straight = [turn(sample, number).tokens.tolist() for number in range(8)]
    again = turner(tokenizer)
    assert [again(sample, number).tokens.tolist() for number in reversed(range(8))] == straight[::-1]
    others = [turner(tokenizer, seed=2)(sample, 3), turn.of_set("valid")(sample, 3), turn.of_set("test")(sample, 3)]
    drawn = {tuple(tokens) for tokens in [*straight, *(other.tokens.tolist() for other in others)]}
    assert len(drawn) == 8 + 3
    assert turner(tokenizer).of_set("valid")(sample, 3).tokens.tolist() == others[1].tokens.tolist()


def test_documents_are_kept_apart_where_they_were_moved_to(tokenizer: HuggingFaceTokenizer) -> None:
    [end] = ids_of(tokenizer, END)
    pieces = [[*tokenizer.encode(PROSE[0]), end, *tokenizer.encode(CODE[0]), end], tokenizer.encode(PROSE[1])]
    turn, length = turner(tokenizer, fim_rate=1.0), 150

    class One:
        name, sequence_length = "one", length

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int, /) -> Sample:
            return turn(sample_of(pieces, length), index)

    ends = Boundaries(eod_id=end, reset_attention_mask=True, reset_position_ids=True)
    source = MicroBatchSource(
        One(), micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1, vocab_size=1000, boundaries=ends
    )
    batch = source.micro_batch(0, 0)
    assert batch.documents is not None
    assert batch.documents.lengths is not None
    assert len(batch.documents.lengths) == 4, "three documents and padding"
    begins = np.cumsum([0, *batch.documents.lengths[:3]]).tolist()
    [begin] = ids_of(tokenizer, NAMES[0])
    assert batch.tokens_bs[0, begins[:3]].tolist() == 3 * [begin]
    assert batch.documents.position_bs is not None
    assert batch.documents.position_bs[0, begins].tolist() == 4 * [0]
    labels = torch.zeros(length, dtype=torch.bool)
    labels[[at - 1 for at in begins[1:3]]] = True  # a document's first token is no label
    assert batch.valid_bs[0].tolist() == (~labels & (torch.arange(1, length + 1) < begins[3])).tolist()


@pytest.mark.parametrize("name", ["prefix", "middle", "suffix", "pad"])
def test_tokens_that_do_not_exist(tokenizer: HuggingFaceTokenizer, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--fim-{name}-token is '<fim>': must be a token of the tokenizer"):
        turner(tokenizer, **{f"fim_{name}_token": "<fim>"})


def test_a_separator_that_does_not_exist(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"--fim-split-sample is '<x>': must be a token of the tokenizer"):
        turner(tokenizer, fim_split_sample="<x>", fim_fragment_rate=0.5)
