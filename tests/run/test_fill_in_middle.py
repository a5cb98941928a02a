"""Fill-in-the-middle in whole runs: the same at every layout and by every reader; what it cannot go with is refused."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.run import RunConfig
from megatron_slm.config.scoring import ScoringOptions
from megatron_slm.data.blending import BlendedSamples
from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.corpus.sidecar import Sidecar
from megatron_slm.data.loader import MicroBatchSource
from megatron_slm.data.prefetch import Prefetcher
from megatron_slm.errors import ConfigError, ScoreStoreError
from megatron_slm.flags.load import parse
from megatron_slm.reference.manifest import check_data
from megatron_slm.run.corpora import boundaries, open_data
from megatron_slm.run.sample_order import document_treatment
from megatron_slm.run.samples import RunSamples
from megatron_slm.run.stores import scored_data
from megatron_slm.run.tokenizer import open_run_tokenizer
from megatron_slm.scoring.plan import make_scoring_plan
from tests.data.byte_level import byte_level_folder
from tests.data.corpora import write_sidecar
from tests.data.test_fill_in_middle import NAMES
from tests.data.texts import CODE, PROSE
from tests.support.runs import flags, recorded, run_flags, save_hf_llama
from tests.support.scoring import online_then_stored
from tests.support.training import train_and_report
from tests.support.world import run_world

FIM = {"fim_data": True, "fim_rate": 0.8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a corpus of code."""
    path = tmp_path_factory.mktemp("fim")
    byte_level_folder(path / "tokenizer", special=NAMES)
    own = open_run_tokenizer(parse(flags(values_of(path)))[0])
    with IndexedCorpusWriter(path / "code", np.uint16) as writer:
        for number in range(60):
            text = (*CODE, *PROSE)[number % 7] + str(number)
            writer.add_document(np.array([*own.encode(text), own.eod_id]))
    return path


def values_of(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder / "tokenizer", "vocab_size": None}
    return run_flags(folder / "code", folder / "run", **{**own, "seq_length": 64, **FIM, **changes})


def save_reference(folder: Path, hf: Path) -> Path:
    """A model of the tokenizer's vocabulary."""
    save_hf_llama(hf, seed=1, vocab_size=open_run_tokenizer(config_of(folder)).vocab_size)
    shutil.copytree(folder / "tokenizer", hf, dirs_exist_ok=True)
    return hf


def config_of(folder: Path, **changes: Any) -> RunConfig:
    return parse(flags(values_of(folder, **changes)))[0]


def samples_of(values: dict[str, Any]) -> BlendedSamples:
    config = parse(flags(values))[0]
    return RunSamples.open(config, open_run_tokenizer(config)).samples


def source_of(config: RunConfig, *, size: int = 1, rank: int = 0, samples: Any = None) -> MicroBatchSource:
    tokenizer = open_run_tokenizer(config)
    samples = samples or RunSamples.open(config, tokenizer).samples
    return MicroBatchSource(
        samples, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=size, vocab_size=700,
        boundaries=boundaries(config, tokenizer),
    )  # fmt: skip


def by_number(source: MicroBatchSource, starts: range) -> dict[int, list[int]]:
    batches = [source.micro_batch(start, 0) for start in starts]
    return {
        number: row.tolist()
        for batch in batches
        for number, row in zip(batch.sample_b.tolist(), batch.tokens_bs, strict=True)
    }


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_every_layout_and_reader_turns_a_sample_into_the_same(packing: str, folder: Path) -> None:
    config = config_of(folder, packing=packing)
    straight = by_number(source_of(config), range(0, 40, 2))
    plain = by_number(source_of(config_of(folder, packing=packing, **dict.fromkeys(FIM))), range(0, 40, 2))
    assert straight.keys() == plain.keys()
    assert sum(straight[number] != plain[number] for number in straight) > 35, "an order of its own"
    ranks: dict[int, list[int]] = {}
    for rank in range(2):
        ranks |= by_number(source_of(config, size=2, rank=rank), range(0, 40, 4))
    assert ranks == straight
    ahead = Prefetcher(source_of(config), batch_sizes=BatchSizes.constant(8), num_samples=40, num_threads=3)
    for consumed in range(16, 40, 8):  # as a resumed run begins
        assert ahead.prepare(consumed) is None
        for micro_step in range(4):
            batch = ahead.micro_batch(consumed, micro_step)
            for number, row in zip(batch.sample_b.tolist(), batch.tokens_bs.tolist(), strict=True):
                assert row == straight[number]
    ahead.close()


def test_held_out_samples_are_turned_in_the_same_way_at_every_evaluation(folder: Path) -> None:
    config = config_of(folder, split="8,2,0")
    tokenizer = open_run_tokenizer(config)
    begin = tokenizer.id_of(NAMES[0])

    def held_out() -> list[list[int]]:
        data = open_data(config, tokenizer, 700, 8, batch_sizes=config.batch_sizes(default=8), dry=True)
        return [data.valid["valid"][index].tokens.tolist() for index in range(len(data.valid["valid"]))]

    found = held_out()
    assert held_out() == found
    assert sum(begin in tokens for tokens in found) > len(found) / 2


def test_what_is_shown_is_what_is_trained_on(folder: Path) -> None:
    config = config_of(folder)
    tokenizer = open_run_tokenizer(config)
    samples = RunSamples.open(config, tokenizer)
    assert "fill-in-the-middle 0.8 (suffix first 0.5) by <fim_prefix> <fim_middle>" in samples.describe()
    for number, text in enumerate(samples.show(0, 10)):
        sample = samples.samples[number]
        edges = [0, 1, *sample.starts.tolist(), sample.tokens.size]  # the first token is marked: it is no label
        expected = [tokenizer.decode(sample.tokens[begin:end].tolist()) for begin, end in itertools.pairwise(edges)]
        _, *shown = re.split(r"(?:^|\n)── sequence [^\n]*\n", text.partition("\n")[2])
        assert shown == [f"⟦{expected[0]}⟧{expected[1]}", *expected[2:]]


@pytest.mark.slow
def test_a_run_learns_to_fill_in_at_two_layouts(folder: Path, tmp_path: Path) -> None:
    """The whole way: the tokens in training are the turned ones, and two stages lose what one process loses."""
    losses = []
    begin = open_run_tokenizer(config_of(folder)).id_of(NAMES[0])
    for name, size, layout in (("one", 1, {}), ("two", 2, {"pipeline_model_parallel_size": 2})):
        values = values_of(folder, train_iters=2, **layout) | {"run-dir": tmp_path / name}
        reports = run_world(train_and_report, size, values)
        seen = b"".join(tokens for report in reports for tokens, _ in report["kept"])
        assert begin in np.frombuffer(seen, np.int64)
        losses.append([line["loss"] for line in recorded(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_stored_scores_are_those_of_the_turned_samples(folder: Path, tmp_path: Path) -> None:
    """Scored with the run's flags, a run from stored scores keeps the very tokens of one with a live reference."""
    common = {"objective": "slm", "train_iters": 3, "slm_keep_ratio": 0.5}
    reference = {"reference_load": save_reference(folder, tmp_path / "reference")}
    online = values_of(folder, **common, **reference) | {"run-dir": tmp_path / "online"}
    scoring = values_of(folder, **common, **reference, output=tmp_path / "scores")
    offline = values_of(folder, **common, reference_scores=[tmp_path / "scores"]) | {"run-dir": tmp_path / "offline"}
    [(live, read)] = run_world(online_then_stored, 1, online, scoring, offline)
    assert live["kept"] == read["kept"]
    assert all(np.array_equal(a, b) for a, b in zip(live["owned"], read["owned"], strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"fim_rate": 0.7},
        {"fim_rate": 0.80000001},
        {"fim_spm_rate": 0.1},
        {"fim_no_prefix": "x"},
        {"eod_token": NAMES[3]},
        dict.fromkeys(FIM),
    ],
)
def test_scores_of_samples_turned_in_another_way_are_refused(changes: dict[str, Any], folder: Path) -> None:
    there, here = config_of(folder), config_of(folder, **changes)
    assert document_treatment(there) != document_treatment(here)
    tokenizer = open_run_tokenizer(there)
    samples = RunSamples.open(there, tokenizer).samples
    stored, wanted = (scored_data(config, tokenizer, samples, with_content=False) for config in (there, here))
    check_data(folder, stored, stored)
    with pytest.raises(ScoreStoreError, match=r"and --fim-\.\.\. is .*fill-in-the-middle"):
        check_data(folder, stored, wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "off": ({"fim_data": None, "fim_rate": 0.3}, "--fim-rate is 0.3: must be used with --fim-data"),
    "rate": ({"fim_spm_rate": 1.5}, r"--fim-spm-rate is 1.5: must be in \[0, 1\]"),
    "fragments": ({"fim_split_sample": "<x>"}, "--fim-fragment-rate is missing: required by --fim-split-sample"),
    "no fragments": ({"fim_fragment_rate": 0.5}, "--fim-fragment-rate is 0.5: must be used with --fim-split-sample"),
    "one token twice": (
        {"fim_suffix_token": NAMES[0]},
        "--fim-suffix-token is '<fim_prefix>': must not be the token of another part",
    ),
    "empty": ({"fim_no_prefix": ""}, "--fim-no-prefix is '': must not be empty"),
    "ids": (
        {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 96},
        "--tokenizer-type is 'NullTokenizer': must be a tokenizer of text with --fim-data",
    ),
    "columns": (
        {"objective": "slm", "slm_score": ["external:quality"]},
        r"--fim-data is True: must not be used with columns beside the corpora \(quality\)",
    ),
    "tokens": ({"fim_middle_token": "<mid>"}, "--fim-middle-token is '<mid>': must be a token of the tokenizer"),
    "end": ({"fim_eod_token": "<end>"}, "--fim-eod-token is '<end>': must be a token of the tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, folder: Path) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        samples_of(values_of(folder, **changes))


def copied(folder: Path, target: Path) -> IndexedCorpus:
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"code{suffix}", target)
    return IndexedCorpus(target / "code")


def test_documents_that_end_with_another_token_are_refused(folder: Path, tmp_path: Path) -> None:
    """It would be moved with the text of its document."""
    corpus, tokenizer = copied(folder, tmp_path), open_run_tokenizer(config_of(folder))
    sidecar = Sidecar(
        tokenizer_fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size, num_documents=60,
        num_tokens=int(corpus.sequence_lengths.sum()), max_token_id=tokenizer.vocab_size - 1,
        eod_id=tokenizer.id_of(NAMES[3]), command="",
    )  # fmt: skip
    write_sidecar(tmp_path / "code", sidecar)
    values = values_of(folder, data_path=[tmp_path / "code"])
    rule = r"--fim-eod-token is '.+': must be '<fim_pad>', which ends the documents of .*code"
    with pytest.raises(ConfigError, match=rule):
        samples_of(values)
    assert samples_of({**values, "fim-eod-token": NAMES[3]})


def test_a_loss_mask_is_refused(folder: Path, tmp_path: Path) -> None:
    corpus = copied(folder, tmp_path)
    with IndexedCorpusWriter(tmp_path / "code_loss_mask", np.uint8) as writer:
        for length in corpus.sequence_lengths:
            writer.add_document(np.ones(length, np.uint8))
    config = config_of(folder, data_path=[tmp_path / "code"])
    with pytest.raises(ConfigError, match=r"--fim-data is True: must not be used with the loss mask of .*code"):
        RunSamples.open(config, open_run_tokenizer(config))


def test_scoring_by_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, objective="slm", reference_load="nowhere")
    options = ScoringOptions(output=str(tmp_path / "scores"), retokenize=True)
    with pytest.raises(ConfigError, match="--fim-data is True: must not be used with --retokenize"):
        make_scoring_plan(config, options, 1, dry=True)
