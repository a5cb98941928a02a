"""Blends equal megatron-core's; phases and longer runs keep every corpus's read position."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.sidecar import Sidecar
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import SlmError
from megatron_slm.flags.load import parse
from megatron_slm.run.corpora import open_data
from tests.data.corpora import write_sidecar
from tests.data.megatron_oracle import StubTokenizer
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.world import run_world

LENGTHS = {"web": 300, "books": 60, "code": 25}


def train_samples(folder: Path, num_samples: int, manifest: Any = None, **changes: Any) -> BlendedSamples:
    run_dir = changes.pop("run_dir", folder / "run")
    values = run_flags(folder, run_dir, **{"vocab_size": 60_000, "seq_length": 16, **changes})
    config, _ = parse(flags(values))
    tokenizer = build_tokenizer("NullTokenizer", None, 60_000)
    return open_data(
        config, tokenizer, 60_001, num_samples, batch_sizes=BatchSizes.constant(8), manifest=manifest
    ).train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blends")
    for seed, (name, count) in enumerate(LENGTHS.items()):
        write_corpus(path / name, seed=seed, num_documents=count, vocab_size=50_000)
    return path


def megatron_blend(folder: str, words: list[str], num_samples: int) -> list[list[int]]:
    """On a rank of a world, because 0.16.1 wants a process group for blends with a cache."""
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    dist.init_process_group("gloo")
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=16,
        blend=get_blend_from_list(words),
        split="1,0,0",
        path_to_cache=f"{folder}/megatron-cache",
        tokenizer=StubTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]
    return [[*train[i]["tokens"].tolist(), int(train[i]["labels"][-1])] for i in range(num_samples)]


@pytest.mark.parametrize(
    ("weights", "num_samples"),
    [([0.6, 0.3, 0.1], 700), ([6, 3, 1], 2000), ([1, 1, 8], 300), (None, 500)],
    ids=["paper", "several epochs", "mostly the smallest", "by size"],
)
def test_a_blend_is_megatrons_sample_by_sample(
    folder: Path, tmp_path: Path, weights: list[float] | None, num_samples: int
) -> None:
    prefixes = [str(folder / name) for name in LENGTHS]
    words = prefixes if weights is None else [x for pair in zip(map(str, weights), prefixes, strict=True) for x in pair]
    ours = train_samples(folder, num_samples, data_path=words, run_dir=tmp_path)
    (theirs,) = run_world(megatron_blend, 1, str(tmp_path), words, num_samples)
    assert [ours[i].tokens.tolist() for i in range(num_samples)] == theirs
    consumed = ours.consumed(num_samples)
    assert consumed == [Counter(ours[i].source for i in range(num_samples))[s] for s in range(3)]


def test_ways_to_name_a_blend_are_one(folder: Path, tmp_path: Path) -> None:
    words = ["0.5", str(folder / "web"), "0.5", f"novels={folder / 'books'}"]
    (tmp_path / "args").write_text(" ".join(words) + "\n")
    (tmp_path / "sets.json").write_text(f'{{"train": ["0.5", "{words[1]}", 0.5, "{words[3]}"], "valid": null}}')
    ways = [
        {"data_path": words},
        {"data_path": None, "train_data_path": words},
        {"data_path": None, "data_args_path": tmp_path / "args"},
        {"data_path": None, "per_split_data_args_path": tmp_path / "sets.json"},
    ]
    found = [train_samples(folder, 40, **way) for way in ways]
    assert len({samples.order_fingerprint for samples in found}) == 1
    assert [source.name for source in found[0].sources] == ["web", "novels"]


def numbers(samples: BlendedSamples, stop: int) -> list[tuple[str, int]]:
    return [(samples.sources[s].name, n) for s, n in map(samples.locate, range(stop))]


def test_phases_keep_each_corpuss_read_position(folder: Path) -> None:
    web, books, code = (str(folder / name) for name in LENGTHS)
    first = ["0.7", web, "0.3", books]
    plain = train_samples(folder, 400, data_path=first)
    phased = train_samples(folder, 400, data_path=first, data_phases=[f"20: 0.2 {code} 0.8 {books}", f"40: {web}"])
    drawn = numbers(phased, 400)
    assert drawn[:160] == numbers(plain, 160)
    for name in LENGTHS:
        of_this = [n for source, n in drawn if source == name]
        assert of_this == list(range(len(of_this))), "in order, none twice, none left out"
    assert Counter(source for source, _ in drawn[160:320]) == {"code": 32, "books": 128}
    assert {source for source, _ in drawn[320:]} == {"web"}
    assert phased.consumed(400) == [Counter(source for source, _ in drawn)[s.name] for s in phased.sources]


class Stored:
    """The fields of a checkpoint's manifest that the data reads."""

    def __init__(self, samples: BlendedSamples, consumed: int) -> None:
        self.data, self.sample_order = samples.state(consumed), None  # the order is compared here, not in `open_data`


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_a_longer_run_keeps_the_order_already_used(folder: Path, packing: str) -> None:
    words = ["0.7", str(folder / "web"), "0.3", str(folder / "code")]
    short = train_samples(folder, 240, data_path=words, packing=packing)
    stored = Stored(short, 160)
    longer = train_samples(folder, 2400, stored, data_path=words, packing=packing)
    assert longer.difference(stored.data, 160) is None
    for i in range(240):
        assert longer[i].tokens.tolist() == short[i].tokens.tolist()
    again = Stored(longer, 800)
    assert train_samples(folder, 2400, again, data_path=words, packing=packing).difference(again.data, 800) is None
    afresh = train_samples(folder, 2400, data_path=words, packing=packing)
    assert packing == "best-fit" or afresh.difference(stored.data, 160) is not None, "the case is one that matters"


def test_every_token_of_an_epoch_comes_before_the_next_order_begins(folder: Path) -> None:
    path = [str(folder / "code")]
    short = train_samples(folder, 20, data_path=path)
    longer = train_samples(folder, 400, Stored(short, 16), data_path=path)
    length = len(short.sources[0].orders[0])
    assert length > 20, "the epoch holds more than the short run asked for"
    assert len({longer[i].tokens.tobytes() for i in range(length)}) == length


def test_a_phase_added_on_resume_continues(folder: Path) -> None:
    web, books = str(folder / "web"), str(folder / "books")
    words = ["0.7", web, "0.3", books]
    before = train_samples(folder, 400, data_path=words)
    stored = Stored(before, 160)
    after = train_samples(folder, 800, stored, data_path=words, data_phases=[f"20: 0.1 {web} 0.9 {books}"])
    assert after.difference(stored.data, 160) is None
    for i in range(160):
        assert after[i].tokens.tolist() == before[i].tokens.tolist()
    past = train_samples(folder, 800, stored, data_path=words, data_phases=[f"19: 0.1 {web} 0.9 {books}"])
    assert "blend of the first 160 samples" in past.difference(stored.data, 160)[0]
    other = train_samples(folder, 400, stored, data_path=["0.6", web, "0.4", books])
    assert "blend" in other.difference(stored.data, 160)[0]


def test_a_corpus_of_other_documents_is_named(folder: Path, tmp_path: Path) -> None:
    words = ["0.7", str(folder / "web"), "0.3", str(folder / "books")]
    stored = Stored(train_samples(folder, 400, data_path=words), 160)
    write_corpus(tmp_path / "books", seed=9, num_documents=60)
    changed = train_samples(folder, 400, stored, data_path=[*words[:3], str(tmp_path / "books")])
    assert changed.difference(stored.data, 160)[0] == "order of the corpus books"


def test_a_corpus_of_other_tokens_is_named(folder: Path, tmp_path: Path) -> None:
    """Its documents are as long as before, so that the order of the samples is the same."""
    fingerprint = build_tokenizer("NullTokenizer", None, 60_000).fingerprint()
    corpus = IndexedCorpus(write_corpus(tmp_path / "books", seed=1, num_documents=60, vocab_size=50_000))
    found = []
    for content in ("a" * 64, "b" * 64):
        sidecar = Sidecar(
            tokenizer_fingerprint=fingerprint, vocab_size=60_001, num_documents=60,
            num_tokens=corpus.num_tokens, max_token_id=1, eod_id=None, command="", bin_sha256=content,
        )  # fmt: skip
        write_sidecar(tmp_path / "books", sidecar)
        found.append(train_samples(folder, 100, data_path=[str(tmp_path / "books")], run_dir=tmp_path / "run"))
    assert found[0].difference(found[0].state(40), 40) is None
    assert found[1].difference(found[0].state(40), 40) == ("content of the corpus books", "a" * 12, "b" * 12)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weight zero": ({"data_path": ["0", "{web}", "1", "{books}"]}, r"--data-path is 0.0: .*above 0 \(weight of .*web\)"),
    "weight negative": ({"data_path": ["1", "{web}", "-1", "{books}"]}, "--data-path is -1.0: .*above 0"),
    "weight not a number": ({"data_path": ["nan", "{web}", "1", "{books}"]}, "--data-path is nan: .* a finite number"),
    "weight infinite": ({"data_path": ["inf", "{web}", "1", "{books}"]}, "--data-path is inf: .* a finite number"),
    "weights of an infinite sum": ({"data_path": ["1e308", "{web}", "1e308", "{books}"]}, r"--data-path is \[1e\+308, 1e\+308\]: .* finite sum"),
    "some weights": ({"data_path": ["1", "{web}", "{books}"]}, r"--data-path is '1 .*web .*books': .*weight"),
    "twice": ({"data_path": ["{web}", "{books}", "{web}"]}, r"--data-path is '.*web': .*once"),
    "one name": ({"data_path": ["a={web}", "a={books}"]}, r"--data-path is '.*books': .*name"),
    "two flags": ({"data_path": ["{web}"], "train_data_path": ["{web}"]}, "--train-data-path is .*--data-path"),
    "nothing": ({"data_path": None}, r"--data-path is (\[\]|missing): "),
    "no file of words": ({"data_path": None, "data_args_path": "{web}.words"}, "--data-args-path is .*readable"),
    "bad json": ({"data_path": None, "per_split_data_args_path": "{web}.bin"}, "--per-split-data-args-path"),
    "phase without a step": ({"data_path": ["{web}"], "data_phases": ["{books}"]}, "--data-phases is .*STEP: BLEND"),
    "phase at 0": ({"data_path": ["{web}"], "data_phases": ["0: {books}"]}, r"--data-phases is '0: .*books': .*step above 0"),
    "phases out of order": ({"data_path": ["{web}"], "data_phases": ["5: {books}", "5: {web}"]}, r"--data-phases is \[5, 5\]: "),
    "weight in a phase": ({"data_path": ["{web}"], "data_phases": ["5: 0 {books} 1 {web}"]}, "--data-phases at step 5 is 0.0"),
    "held-out split without a sample": ({"data_path": ["{code}"], "split": "999,1,0"}, r"valid.*--split 999,1,0.* is 0: must be at least 1"),
    "test split without a sample": ({"data_path": ["0.9", "{web}", "0.1", "{code}"], "split": "8,1,0.001"}, r"test.*--split 8,1,0.001.* is 0: .*--test-data-path"),
    "split without a sample": ({"data_path": ["0.9", "{web}", "0.1", "{code}"], "split": "1,99,0"}, "number of tokens in sequences .*code is 0: must be at least"),
    "threads": ({"data_path": ["{web}"], "num_workers": -1}, "--num-workers is -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    changes, pattern = REFUSED[name]
    places = {name: folder / name for name in LENGTHS}

    def fill(value: Any) -> Any:
        return [x.format(**places) for x in value] if isinstance(value, list) else str(value).format(**places)

    with pytest.raises(SlmError, match=pattern):
        train_samples(folder, 100, **{k: v if v is None else fill(v) for k, v in changes.items()})


def test_a_prefix_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "date=2024").mkdir()
    prefix = write_corpus(tmp_path / "date=2024" / "web")
    assert [s.name for s in train_samples(tmp_path, 10, data_path=[str(prefix)]).sources] == ["web"]
