"""A store that does not fit the run, or is not whole, ends it before the first step with the two values that differ."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_slm.errors import ConfigError, ScoreStoreError, SlmError
from megatron_slm.flags.load import parse
from megatron_slm.reference.manifest import StoredDistribution, StoreManifest, shard_name
from megatron_slm.run.checks import check_distributions
from megatron_slm.run.dry_run import print_dry_run
from megatron_slm.run.plan import make_plan
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.scoring import score_here
from tests.support.training import command
from tests.support.world import WorldError, reported_error, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    save_hf_llama(path / "other_reference", seed=1)
    # the same lengths, so that only the content tells them apart
    write_corpus(path / "same_lengths")
    tokens = bytearray((path / "same_lengths.bin").read_bytes())
    tokens[100] ^= 1
    (path / "same_lengths.bin").write_bytes(tokens)
    write_corpus(path / "longer", num_documents=41)
    for name in ("reference", "other_reference"):
        run_world(score_here, 1, scoring(path, name, path / f"of_{name}"))
    return path


def scoring(folder: Path, reference: str, output: Path) -> dict[str, Any]:
    return run_flags(
        folder / "corpus", folder / "run", objective="slm", reference_load=folder / reference, output=output
    )


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    run = {"objective": "slm", "reference_scores": [folder / "of_reference"]}
    corpus, run_dir = folder / changes.pop("corpus", "corpus"), changes.pop("run_dir", folder / "run")
    return run_flags(corpus, run_dir, **{**run, **changes})


def plan(folder: Path, **changes: Any) -> Any:
    return make_plan(parse(flags(values(folder, **changes)))[0], 1)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 5}, r"--seed is 1234: must be the run's, 5\."),
    "length": ({"seq_length": 8}, r"--seq-length is 16: must be the run's, 8\."),
    "split": ({"split": "9,1,0"}, r"--split.* is \(0, 40\): must be the run's, \(0, 36\)"),
    "corpus of another size": ({"corpus": "longer", "split": "40,1,0"}, r"--data-path \(size.* is \d+: must be the run's, \d+"),
    "corpus with one token changed": ({"corpus": "same_lengths"}, r"--data-path \(checksum.* is '\w+': must be the run's, '\w+'"),
    "tokenizer": ({"vocab_size": 97}, r"--tokenizer-model.* is '\w+': must be the run's, '\w+'"),
    "longer run": ({"train_iters": 6}, r"samples is 40: must be at least the run's, 48 "),
    "much longer run": ({"train_iters": 60}, r"epochs.* is 1: must be the run's, \d+"),
    "larger batch": ({"global_batch_size": 10}, r"samples is 40: must be at least the run's, 50 "),
    "no store": ({"reference_scores": ["{folder}/nowhere"]}, r"nowhere.*hold a manifest\.json"),
    "a folder of another kind": ({"reference_scores": ["{folder}/reference"]}, r"hold a manifest\.json"),
    "another reference": ({"reference_load": "{folder}/other_reference"}, r"of_reference: reference is '.*/reference \(\w+\)': must .*--reference-load, .*other_reference \(\w+\)"),
    "one reference twice": ({"reference_scores": ["{folder}/of_reference", "{folder}/of_reference"], "reference_scores_combine": "mean"}, "different references, but both are of .*/reference"),
    "several, not combined": ({"reference_scores": ["{folder}/of_reference", "{folder}/of_other_reference"]}, r"--reference-scores-combine is missing: required by several"),
    "one, combined": ({"reference_scores_combine": "mean"}, "--reference-scores-combine is 'mean'"),
    "several and a model": ({"reference_scores": ["{folder}/of_reference", "{folder}/of_other_reference"], "reference_scores_combine": "mean", "reference_load": "{folder}/reference"}, r"--reference-load is .*must not be used with several"),
    "losses alone, distilled": ({"loss": "jsd"}, r"--reference-scores is .*hold log-probabilities, required by --loss jsd"),
    "plain objective": ({"objective": "clm"}, "--reference-scores is "),
}  # fmt: skip


def filled(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [filled(item, folder) for item in value]
    return value.format(folder=folder) if isinstance(value, str) else value


@pytest.mark.parametrize("name", CASES)
def test_a_store_of_something_else_is_refused_by_name(name: str, folder: Path) -> None:
    changes, pattern = CASES[name]
    with pytest.raises((ScoreStoreError, ConfigError)) as refused:
        plan(folder, **{k: filled(v, folder) for k, v in changes.items()})
    assert re.search(pattern, str(refused.value)), refused.value


@pytest.mark.parametrize(
    ("loss", "kind", "count", "message"),
    [
        ("reverse-kl", "sample", 4, "--loss reverse-kl: --reference-scores is .*sampled ids .* for --loss kl alone"),
        ("kl", "top", 90, "--reference-scores: vocabulary size is 90: must be the model's, 97, where all"),
    ],
)
def test_stored_probabilities_that_cannot_be_distilled(loss: str, kind: Any, count: int, message: str) -> None:
    config, _ = parse(["--train-iters", "3", "--reference-scores", "store", "--loss", loss])
    stored = StoredDistribution(kind=kind, count=count, dtype="bfloat16", vocabulary_size=90)
    with pytest.raises(ScoreStoreError, match=message):
        check_distributions(config, SimpleNamespace(distribution=stored), 97)  # type: ignore[arg-type]
    fewer = StoredDistribution(kind="top", count=89, dtype="bfloat16", vocabulary_size=90)
    check_distributions(config, SimpleNamespace(distribution=fewer), 97)  # type: ignore[arg-type]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_last(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [(remove, "missing"), (truncate, "bytes long"), (flip_last, "manifest's sha256")],
)
def test_a_damaged_store_ends_every_rank_before_the_first_step(
    damage: Callable[[Path], None], pattern: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "of_reference", tmp_path / "store")
    damage(tmp_path / "store" / shard_name(1))
    run = values(folder, reference_scores=[tmp_path / "store"], run_dir=tmp_path / "run")
    with pytest.raises(WorldError) as failed:
        run_world(command, 2, flags({**run, "pipeline-model-parallel-size": 2}))
    assert failed.value.codes == [2, 2]
    error = reported_error(failed.value)
    assert re.search(f"{shard_name(1)}.*{pattern}", error), error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unfinished_store_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "of_reference", tmp_path / "store")
    manifest = StoreManifest.read(tmp_path / "store")
    manifest.with_shards({shard_name(0): manifest.shards[shard_name(0)]}).write(tmp_path / "store")
    with pytest.raises(SlmError, match=r"1 shards.*must be complete, all 3 shards"):
        plan(folder, reference_scores=[tmp_path / "store"])


def test_a_store_that_fits_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shorter runs of the same order, the reference beside it by name, and several references together."""
    made = plan(folder, train_iters=4, reference_load=folder / "reference")
    assert made.models.reference is None
    assert made.has_reference
    both = [folder / "of_reference", folder / "of_other_reference"]
    print_dry_run(plan(folder, reference_scores=both, reference_scores_combine="minimum"))
    shown = re.sub(r"\s+", "", capsys.readouterr().out)
    assert "keep0.6byexcess" in shown
    assert shown.count("40samplesinfloat32") == 2


def test_two_references_train_on_the_less_surprised_one(folder: Path, tmp_path: Path) -> None:
    """The least of two losses is below each alone, token by token, so the logged reference loss is too."""
    losses = {}
    stores = {"one": ["of_reference"], "other": ["of_other_reference"], "both": ["of_reference", "of_other_reference"]}
    for name, chosen in stores.items():
        combine = {"reference_scores_combine": "minimum"} if len(chosen) > 1 else {}
        paths = [folder / store for store in chosen]
        run = values(folder, reference_scores=paths, run_dir=tmp_path / name, train_iters=2, **combine)
        run_world(command_ok, 1, flags(run))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["reference_loss"] for line in lines]
    for both, one, other in zip(losses["both"], losses["one"], losses["other"], strict=True):
        assert both < min(one, other) - 0.01


def command_ok(argv: list[str]) -> None:
    from megatron_slm.cli.pretrain import main

    assert main(argv) == 0
