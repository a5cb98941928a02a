"""Whole runs on blends: what is logged, where they resume, how they stop when a shard cannot be read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.data import reading
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.interleave import Interleave, normalized
from megatron_slm.flags.load import parse
from megatron_slm.run.plan import make_plan
from tests.support.documents import token_losses
from tests.support.runs import recorded, run_flags, save_hf_llama, write_corpus
from tests.support.training import command, flags, train_and_report
from tests.support.world import WorldError, reported_error, run_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blended")
    for seed, (name, count) in enumerate({"web": 60, "books": 30, "code": 12}.items()):
        write_corpus(path / name, seed=seed, num_documents=count)
    save_hf_llama(path / "reference")
    return path


def blend(folder: Path, *weights: float) -> list[str]:
    names = ("web", "books", "code")
    return [x for w, name in zip(weights, names, strict=True) for x in (str(w), str(folder / name))]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return recorded(run_dir)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(4, {"pipeline_model_parallel_size": 2}), (2, {"deepspeed_config": "ds_configs/zero2_bf16.json"})],
    ids=["stages", "zero 2"],
)
def test_losses_and_counts_of_each_corpus_are_logged(
    folder: Path, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    values = run_flags(
        folder, tmp_path, objective="slm", reference_load=folder / "reference", train_iters=3, slm_keep_ratio=0.5,
        **{"data_path": blend(folder, 6, 3, 1), **layout},
    )  # fmt: skip
    seen: dict[int, dict[str, np.ndarray]] = {}
    for rank in run_world(token_losses, world_size, values):
        seen.update(rank)
    for step, line in enumerate(lines(tmp_path)):
        parts = line["sources"]
        assert list(parts) == ["web", "books", "code"]
        assert sum(part["samples"] for part in parts.values()) == 8 * (step + 1)
        for name in ("kept_tokens", "valid_tokens"):
            assert sum(part[name] for part in parts.values()) == line[name]
        mean = (
            sum(p["loss_all"] * p["valid_tokens"] for p in parts.values() if p["valid_tokens"]) / line["valid_tokens"]
        )
        assert mean == pytest.approx(line["loss_all"], rel=1e-12)
        mean = sum(p["loss"] * p["kept_tokens"] for p in parts.values() if p["kept_tokens"]) / line["kept_tokens"]
        assert mean == pytest.approx(line["loss"], rel=1e-12)
    blended = Interleave(normalized(normalized([6, 3, 1])), 8)
    order = [blended[i][0] for i in range(8)]
    first = lines(tmp_path)[0]["sources"]
    for number, name in enumerate(("web", "books", "code")):
        rows = [seen[i] for i in range(8) if order[i] == number]
        assert first[name]["valid_tokens"] == 16 * len(rows)
        if rows:
            assert first[name]["loss_all"] == pytest.approx(np.mean([row["loss"] for row in rows]), rel=1e-5)


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_a_resumed_run_draws_the_same_global_batches_at_any_layout(folder: Path, tmp_path: Path, packing: str) -> None:
    """Other data-parallel and micro-batch sizes and numbers of reading threads, one phase after the stop."""
    phases = [f"5: 0.5 {folder / 'code'} 0.5 {folder / 'web'}"]

    def values(name: str, **changes: Any) -> dict[str, Any]:
        common = {"data_path": blend(folder, 5, 3, 2), "data_phases": phases, "packing": packing, "lr_decay_iters": 8}
        return run_flags(folder, tmp_path / name, **{**common, "train_iters": 8, **changes})

    def drawn(reports: list[dict[str, Any]], per_step: int) -> list[list[bytes]]:
        """The samples of each step in any order, from what every rank trained on."""
        steps: dict[int, list[bytes]] = {}
        for report in reports:
            micro_batches = [(tokens, len(tokens) // (16 * 8)) for tokens, _ in report["kept"]]
            count = 0
            for tokens, b in micro_batches:
                for row in range(b):
                    steps.setdefault(count // per_step, []).append(tokens[row * 128 : (row + 1) * 128])
                    count += 1
        return [sorted(steps[step]) for step in sorted(steps)]

    straight = drawn(run_world(train_and_report, 1, values("straight")), 8)
    run_world(train_and_report, 1, values("again", train_iters=4, save_interval=4))
    load = tmp_path / "again" / "checkpoints"
    for name, world, changes in (
        ("dp 4", 4, {"micro_batch_size": 1, "num_workers": 0}),
        ("dp 2 with stages", 4, {"micro_batch_size": 4, "pipeline_model_parallel_size": 2, "num_workers": 1}),
    ):
        reports = run_world(train_and_report, world, values(name, load=load, **changes))
        data_parallel = 4 if name == "dp 4" else 2
        assert drawn([r for r in reports if r["kept"]], 8 // data_parallel) == straight[4:]
    manifest = json.loads((load / "step_00000004" / "manifest.json").read_text())
    assert sum(manifest["data"]["consumed"].values()) == 32


def test_another_blend_is_refused_on_resume_with_the_way_to_have_it(folder: Path, tmp_path: Path) -> None:
    run_world(
        train_and_report,
        1,
        run_flags(folder, tmp_path, data_path=blend(folder, 6, 3, 1), train_iters=2, save_interval=2),
    )
    again = run_flags(folder, tmp_path, data_path=blend(folder, 1, 1, 8), train_iters=4, load=tmp_path / "checkpoints")
    with pytest.raises(WorldError) as failed:
        run_world(command, 1, flags(again))
    (error,) = [line for line in failed.value.outputs[0].splitlines() if line.startswith("error: ")]
    assert "--load: blend of the first 16 samples" in error
    assert "add a phase to --data-phases" in error
    changed = run_flags(
        folder, tmp_path, data_path=blend(folder, 6, 3, 1), train_iters=4, load=tmp_path / "checkpoints",
        data_phases=[f"2: {folder / 'code'}"], source_log_interval=2,
    )  # fmt: skip
    run_world(train_and_report, 2, changed)
    assert ["sources" in line for line in lines(tmp_path)] == [True, True, False, True], "every second step"
    last = lines(tmp_path)[-1]
    assert last["step"] == 4
    before = lines(tmp_path)[1]["sources"]
    for name, more in {"web": 0, "books": 0, "code": 16}.items():
        assert last["sources"][name]["samples"] == before[name]["samples"] + more


def train_on_a_failing_disk(values: dict[str, Any], rank: int, after: int) -> int:
    """The command, with a corpus that cannot be read on one rank from its read number `after` on."""
    reading.RETRY_SECONDS = (0.0,)
    real, reads = os.pread, [0]

    def failing(descriptor: int, count: int, offset: int) -> bytes:
        reads[0] += 1
        if reads[0] > after:
            raise OSError(5, "Input/output error")
        return real(descriptor, count, offset)

    if int(os.environ["RANK"]) == rank:
        os.pread = failing
    return command(flags(values))


@pytest.mark.parametrize("rank", [0, 3])
def test_an_unreadable_shard_stops_all_ranks_with_the_state_saved(folder: Path, tmp_path: Path, rank: int) -> None:
    def values(name: str, **changes: Any) -> dict[str, Any]:
        return run_flags(
            folder / "web", tmp_path / name, train_iters=10, lr_decay_iters=10, pipeline_model_parallel_size=2,
            **changes,
        )  # fmt: skip

    straight = run_world(train_and_report, 4, values("straight"))
    with pytest.raises(WorldError) as failed:
        run_world(train_on_a_failing_disk, 4, values("stopped", save_interval=100), rank, 45)
    assert failed.value.codes == [1] * 4
    error = reported_error(failed.value)
    assert re.search(r"web\.bin': must be readable in sequence \d+ from token \d+.*Input/output error", error)
    saved = tmp_path / "stopped" / "checkpoints"
    step = int((saved / "latest").read_text().removeprefix("step_"))
    assert 1 <= step < 10
    resumed = run_world(train_and_report, 4, values("stopped", save_interval=100, load=saved))
    for one, other in zip(straight, resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one["parameters"], other["parameters"], strict=True))
    assert lines(tmp_path / "straight") == lines(tmp_path / "stopped")


def train_with_a_file_that_fails(values: dict[str, Any], rank: int, name: str, after: int) -> int:
    """The command, with one file that cannot be read on one rank from its read number `after` on."""
    reading.RETRY_SECONDS = (0.0,)
    real, reads = os.pread, [0]

    def failing(descriptor: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            reads[0] += 1
            if reads[0] > after:
                raise OSError(5, "Input/output error")
        return real(descriptor, count, offset)

    if int(os.environ["RANK"]) == rank:
        os.pread = failing
    return command(flags(values))


@pytest.mark.parametrize(("rank", "save_interval", "asynchronous"), [(0, 100, False), (3, 100, False), (1, 4, True)])
def test_an_unreadable_held_out_shard_stops_all_ranks_with_the_state_saved(
    folder: Path, tmp_path: Path, rank: int, save_interval: int, asynchronous: bool
) -> None:
    """It is read within an evaluation, where the stages of a pipeline wait for each other."""

    def values(name: str, **changes: Any) -> dict[str, Any]:
        return run_flags(
            folder / "web", tmp_path / name, train_iters=6, lr_decay_iters=6, pipeline_model_parallel_size=2,
            eval_interval=2, valid_data_path=[f"held={folder / 'books'}"], **changes,
        )  # fmt: skip

    straight = run_world(train_and_report, 4, values("straight"))
    saves = {"save_interval": save_interval, "async_save": asynchronous}
    saves = {name: value for name, value in saves.items() if value}
    with pytest.raises(WorldError) as failed:  # the first evaluation makes about 40 reads
        run_world(train_with_a_file_that_fails, 4, values("stopped", **saves), rank, "books.bin", 60)
    assert failed.value.codes == [1] * 4
    error = reported_error(failed.value)
    assert re.search(r"books\.bin': must be readable in sequence \d+ from token \d+.*Input/output error", error)
    saved = tmp_path / "stopped" / "checkpoints"
    assert (saved / "latest").read_text() == "step_00000004"
    resumed = run_world(train_and_report, 4, values("stopped", load=saved, **saves))
    for one, other in zip(straight, resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one["parameters"], other["parameters"], strict=True))
    assert lines(tmp_path / "straight") == lines(tmp_path / "stopped")


def test_a_loss_mask_beside_the_corpus_is_obeyed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "sft", num_documents=20)
    from megatron_slm.data.corpus.indexed import IndexedCorpus

    corpus, generator = IndexedCorpus(tmp_path / "sft"), np.random.default_rng(0)
    masks = [generator.random(int(n)) < 0.5 for n in corpus.sequence_lengths]
    with IndexedCorpusWriter(tmp_path / "sft_loss_mask", np.uint8) as writer:
        for mask in masks:
            writer.add_document(mask.astype(np.uint8))
    for packing in ("concatenate", "best-fit"):
        values = run_flags(tmp_path / "sft", tmp_path / packing, train_iters=3, packing=packing, seq_length=40)
        (seen,) = run_world(token_losses, 1, values)
        trained = {}
        for i, mask in enumerate(masks):
            tokens = corpus.get(i).tolist()
            for place in range(1, len(tokens)):
                trained.setdefault((tokens[max(0, place - 3) : place + 1]).__repr__(), set()).add(bool(mask[place]))
        checked = 0
        for columns in seen.values():
            window = [*columns["tokens"].tolist(), int(columns["labels"][-1])]
            for place in range(4, 40):
                expected = trained.get(repr(window[place - 3 : place + 1]))
                if expected is not None and len(expected) == 1:
                    assert columns["valid"][place - 1] == next(iter(expected))
                    checked += 1
        assert checked > 200


def test_test_sets_are_evaluated_at_the_end(folder: Path, tmp_path: Path) -> None:
    values = run_flags(
        folder / "web",
        tmp_path,
        train_iters=4,
        eval_interval=2,
        split="8,1,1",
        test_data_path=[f"b={folder / 'books'}"],
    )
    run_world(train_and_report, 1, values)
    evaluations = [(line["step"], line["set"]) for line in lines(tmp_path) if line.get("event") == "eval"]
    assert evaluations == [(2, "valid"), (4, "valid"), (4, "test"), (4, "test-b")]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"split": "100,0,0", "eval_interval": 1}, "--eval-interval has no effect"),
        ({"split": "9,1,0", "eval_interval": 1}, None),
        ({"eval_interval": 1, "valid_data_path": "{folder}/code"}, None),
        ({"eval_interval": 1, "probe_file": "{folder}/probe.jsonl"}, None),
        (
            {"data_phases": ["2: {folder}/code", "3: {folder}/web"]},
            "the phase at step 3 has no effect in a run of 3 steps",
        ),
        ({"data_phases": ["2: {folder}/code"]}, None),
    ],
)
def test_what_never_comes_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], warning: str | None
) -> None:
    (folder / "probe.jsonl").write_text('{"text": "1 2 3"}\n')
    words = [
        word.replace("{folder}", str(folder))
        for word in flags(run_flags(Path("{folder}/web"), tmp_path, train_iters=3, **changes))
    ]
    make_plan(parse(words)[0], 1)
    said = [record.getMessage() for record in caplog.records if "meta.json" not in record.getMessage()]
    assert len(said) == (warning is not None), said
    assert warning is None or warning in said[0]
