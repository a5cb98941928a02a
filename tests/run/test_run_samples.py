"""Samples that are shown to people are those that a run trains on, whatever it is made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data.corpus.indexed import IndexedCorpus
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.flags.load import parse
from megatron_slm.run.samples import RunSamples
from megatron_slm.run.tokenizer import open_run_tokenizer
from tests.support.documents import token_losses
from tests.support.runs import flags, run_flags, write_corpus
from tests.support.training import train_and_report
from tests.support.world import run_world

RUNS: dict[str, dict[str, Any]] = {
    "one corpus": {"data_path": ["web"], "eod_mask_loss": True},
    "blend in phases": {"data_path": [0.6, "web", 0.4, "books"], "data_phases": ["2: code web"]},
    "best-fit": {"data_path": ["web", "books"], "packing": "best-fit", "reset_attention_mask": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run_samples")
    for seed, (name, count) in enumerate({"web": 60, "books": 30, "code": 12}.items()):
        write_corpus(path / name, seed=seed, num_documents=count)
    return path


def values_of(folder: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Flags of a run, with the names of corpora turned into their prefixes."""

    def placed(words: list[Any]) -> list[str]:
        return [re.sub(r"\b(web|books|code)\b", lambda found: str(folder / found[0]), str(word)) for word in words]

    paths = {name: placed(changes.pop(name)) for name in ("data_path", "data_phases") if name in changes}
    return run_flags(folder, run_dir, **{"train_iters": 4, **paths, **changes})


def shown(values: dict[str, Any], first: int, count: int) -> list[str]:
    config = parse(flags(values))[0]
    return list(RunSamples.open(config, open_run_tokenizer(config)).show(first, count))


def read_back(text: str, folder: Path) -> tuple[list[int], list[bool]]:
    """Tokens and whether each is trained on, from what is printed; every line is looked up in its corpus."""
    title, *lines = text.splitlines()
    name = re.search(r"sample \d+ of (\w+)(?:,|$)", title.partition(":")[2])
    assert name is not None
    corpus, tokens, trained = IndexedCorpus(folder / name[1]), [], []
    for heading, content in zip(lines[::2], [*lines[1::2], ""], strict=False):
        if padding := re.match(r"── padding, (\d+) tokens", heading):
            tokens += [0] * int(padding[1])
            trained += [False] * int(padding[1])
            continue
        found = re.match(
            r"── sequence (\d+), tokens \[(\d+), (\d+)\), (\d+) trained on, (ends here|continues)$", heading
        )
        assert found is not None, heading
        sequence, start, stop, count = map(int, found.groups()[:4])
        here, inside = [], False
        for mark in re.findall(r"\d+|[⟦⟧]", content):
            if mark.isdigit():
                tokens.append(int(mark))
                here.append(not inside)
            inside = {"⟦": True, "⟧": False}.get(mark, inside)
        assert tokens[-len(here) :] == corpus.get(sequence, start, stop - start).tolist()
        assert sum(here) == count
        assert (found[5] == "ends here") == (stop == corpus.sequence_lengths[sequence])
        trained += here
    return tokens, trained


@pytest.mark.parametrize("name", RUNS)
def test_what_is_shown_is_what_is_trained_on(name: str, folder: Path, tmp_path: Path) -> None:
    values = values_of(folder, tmp_path / "run", **RUNS[name])
    (seen,) = run_world(token_losses, 1, values)
    texts = shown({**values, "run-dir": tmp_path / "elsewhere"}, 0, 32)
    for number, text in enumerate(texts):
        tokens, trained = read_back(text, folder)
        step, place = number // 8 + 1, number % 8
        assert text.startswith(f"━━ sample {number} of 32: place {place} of step {step}, ")
        assert tokens == [*seen[number]["tokens"].tolist(), int(seen[number]["labels"][-1])]
        assert trained[0] is False
        assert trained[1:] == seen[number]["valid"].tolist()
    assert not (tmp_path / "elsewhere").exists(), "looking leaves nothing behind"
    if name == "blend in phases":
        assert "phase 1 of 2" in texts[15]
        assert "phase 2 of 2" in texts[16]


def test_an_extended_run_is_shown_in_the_order_it_has_begun(folder: Path, tmp_path: Path) -> None:
    begun = values_of(folder, tmp_path / "run", data_path=["code"], train_iters=3, save_interval=3)
    run_world(train_and_report, 1, begun)
    longer = {**begun, "train-iters": 14, "load": tmp_path / "run" / "checkpoints"}
    (seen,) = run_world(token_losses, 1, {**longer, "save-interval": 100})
    for number, text in zip(range(24, 112), shown(longer, 24, 88), strict=True):
        assert read_back(text, folder)[0][:-1] == seen[number]["tokens"].tolist()
    fresh = [read_back(text, folder)[0][:-1] for text in shown({k: v for k, v in longer.items() if k != "load"}, 24, 8)]
    assert any(tokens != seen[24 + i]["tokens"].tolist() for i, tokens in enumerate(fresh)), "the order matters here"
    with pytest.raises(CheckpointError, match="--load: order of the corpus code"):
        shown({**longer, "seed": 9}, 24, 1)


def test_a_run_of_no_said_length_is_as_long_as_what_is_shown(folder: Path, tmp_path: Path) -> None:
    values = values_of(folder, tmp_path / "run", data_path=["web"])
    del values["train-iters"], values["global-batch-size"]
    config = parse(flags(values), train_iters=5)[0]
    samples = RunSamples.open(config, open_run_tokenizer(config), 5)
    assert "a run of 5 samples of 16 tokens, documents: concatenate" in samples.describe()
    straight = {**values, "train-iters": 5, "global-batch-size": 1, "micro-batch-size": 1}
    assert [read_back(text, folder) for text in samples.show(3, 2)] == [
        read_back(text, folder) for text in shown(straight, 3, 2)
    ]
    with pytest.raises(ConfigError, match=r"--first-sample plus --samples is 6: must be at most 5"):
        list(samples.show(4, 2))
    assert np.unique([read_back(text, folder)[0] for text in samples.show(0, 5)], axis=0).shape[0] == 5
