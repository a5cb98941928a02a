"""The scoring pass: killed anywhere it goes on where it was, at any layout; its command says what it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.reference.manifest import MANIFEST, StoreManifest, shard_name
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus
from tests.support.scoring import score_and_die, score_command, score_here, stored
from tests.support.training import command
from tests.support.world import WorldError, reported_error, run_world

STAGES = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scoring")
    write_corpus(path / "corpus")
    save_hf_llama(path / "reference")
    run_world(score_here, 1, values(path, path / "whole"))
    return path


def values(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    run = {"objective": "slm", "train_iters": 5, "reference_load": folder / "reference", "output": output}
    return run_flags(folder / "corpus", folder / "run", **{**run, **changes})


@pytest.mark.parametrize(
    ("world_size", "victim", "where"),
    [(1, 0, "before the rename"), (4, 3, "before the rename"), (2, 1, "before the manifest")],
)
def test_a_killed_pass_goes_on_at_another_layout(
    world_size: int, victim: int, where: str, folder: Path, tmp_path: Path
) -> None:
    """40 samples in three shards, of 14 each: the pass dies in the second one and goes on with two stages."""
    store = tmp_path / "store"
    layout = STAGES if world_size > 1 else {}
    with pytest.raises(WorldError) as failed:
        run_world(score_and_die, world_size, values(folder, store, **layout), 1, victim, where)
    assert 9 in failed.value.codes
    done = StoreManifest.read(store).shards
    assert list(done) == ([shard_name(0)] if world_size < 4 else [])  # two pipelines start with the shards 0 and 1
    before = {name: (store / name).stat().st_mtime_ns for name in done}

    run_world(score_here, 2, values(folder, store, **STAGES))
    assert {name: (store / name).stat().st_mtime_ns for name in done} == before, "what was done is not done again"
    torch.testing.assert_close(stored(store), stored(folder / "whole"), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in store.iterdir()) == [MANIFEST, *(shard_name(i) for i in range(3))]


def test_a_damaged_shard_is_scored_again(folder: Path, tmp_path: Path) -> None:
    run_world(score_here, 1, values(folder, tmp_path / "store"))
    shard = tmp_path / "store" / shard_name(2)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] + bytes(3))
    run_world(score_here, 1, values(folder, tmp_path / "store"))
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_storage_is_the_rounded_losses(dtype: str, folder: Path, tmp_path: Path) -> None:
    run_world(score_here, 1, values(folder, tmp_path / "store", score_dtype=dtype))
    assert torch.equal(stored(tmp_path / "store"), stored(folder / "whole").to(getattr(torch, dtype)))


def test_a_score_that_reads_entropies_needs_a_store_with_them(folder: Path, tmp_path: Path) -> None:
    run = run_flags(
        folder / "corpus", tmp_path / "run", objective="slm", slm_score="reference-entropy",
        reference_scores=folder / "whole",
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(command, 1, flags(run))
    assert re.search(r"error: --reference-scores is .*hold entropies.*--with-entropy", failed.value.outputs[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 3}, r"--seed is 1234: must .*3"),
    "dtype": ({"score_dtype": "float16"}, r"--score-dtype is 'float32': .*'float16'"),
    "length of run": ({"train_iters": 4}, r"samples.* is 40: .*32"),
    "no reference": ({"reference_load": None, "reference_scores": "{folder}/whole"}, "--reference-load is missing"),
    "no output": ({"output": None}, "--output is missing"),
    "output of another kind": ({"output": "{folder}/reference"}, "store's manifest.json, not"),
    "no batch size": ({"global_batch_size": None}, "--global-batch-size is missing"),
    "unknown flag": ({"score_dtypes": "float16"}, "score.dtypes.*known flag"),
    "unknown dtype": ({"score_dtype": "int8"}, "score-dtype.*int8"),
    "plain objective": ({"objective": "clm"}, "--reference-load"),
    "more ids than there are": ({"top_logprobs": 98}, "--top-logprobs is 98: must be at most the tokenizer's 97 ids"),
    "two references": (
        {"reference_base": "{folder}/base", "slm_score": "reference-loss"},
        "--reference-base is .*must not be used in scoring",
    ),
    "another vocabulary": ({"vocab_size": 200}, "--reference-load: vocabulary size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_one_error(name: str, folder: Path) -> None:
    changes, pattern = REFUSED[name]
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    before = sorted((folder / "whole").iterdir())
    with pytest.raises(WorldError) as failed:
        run_world(score_command, 1, flags(values(folder, **{"output": folder / "whole", **changes})))
    assert failed.value.codes == [1]
    errors = [line for line in failed.value.outputs[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(pattern, errors[0]), errors[0]
    assert "Traceback" not in failed.value.outputs[0]
    assert sorted((folder / "whole").iterdir()) == before


def test_an_error_of_one_rank_ends_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorldError) as failed:
        run_world(score_command, 2, flags(values(folder, tmp_path / "file", **STAGES)))
    assert failed.value.codes == [1, 1]
    assert reported_error(failed.value).startswith("error: --output")
