"""A run that is stopped and resumed has the very losses and weights of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.checkpoint.format import find_checkpoint
from tests.support.cases import some_by_default
from tests.support.runs import recorded, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import (
    train_and_die_while_saving,
    train_and_report,
    train_drawing_random_numbers,
    train_with_a_full_disk,
)
from tests.support.world import WorldError, reported_error, run_world

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2 tp2": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "pp2 dp2": (4, {"pipeline_model_parallel_size": 2}),
    "pp2 tp2 bf16 sp tied": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "bf16": True,
            "no_untie_embeddings_and_output_weights": True,
        },
    ),
    "zero3 dp2": (2, {"deepspeed_config": "ds_configs/zero3_bf16.json"}),
    "zero2 tp2 bf16": (
        2,
        {"deepspeed_config": "ds_configs/zero2_bf16.json", "tensor_model_parallel_size": 2, "bf16": True},
    ),
}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return recorded(run_dir)


def assert_bit_equal(straight: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    for one, other in zip(straight, resumed, strict=True):
        for name in ("parameters", "owned"):
            for a, b in zip(one[name], other[name], strict=True):
                assert np.array_equal(a, b)
        assert np.array_equal(one["rng"], other["rng"])
        assert one["kept"][-len(other["kept"]) :] == other["kept"]


@pytest.mark.parametrize("name", some_by_default(CASES, "pp2 tp2 bf16 sp tied", "zero3 dp2", "zero2 tp2 bf16"))
def test_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    world_size, layout = CASES[name]
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "reference")
    common = {"objective": "slm", "reference_load": reference, "train_iters": 6, "lr_decay_iters": 6, **layout}
    straight_flags = run_flags(corpus, tmp_path / "straight", **common)
    straight = run_world(train_drawing_random_numbers, world_size, straight_flags)

    stopped = run_flags(corpus, tmp_path / "resumed", **{**common, "train_iters": 3}, save_interval=2)
    run_world(train_drawing_random_numbers, world_size, stopped)
    again = run_flags(corpus, tmp_path / "resumed", **common, load=tmp_path / "resumed" / "checkpoints")
    resumed = run_world(train_drawing_random_numbers, world_size, again)

    assert_bit_equal(straight, resumed)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")
    assert [line["step"] for line in metrics(tmp_path / "resumed")] == [1, 2, 3, 4, 5, 6]


def test_resuming_from_an_earlier_checkpoint_tells_one_history(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    full = run_flags(corpus, tmp_path / "run", train_iters=5, save_interval=2)
    run_world(train_and_report, 1, full)
    before = metrics(tmp_path / "run")
    again = run_flags(corpus, tmp_path / "run", train_iters=5, load=tmp_path / "run/checkpoints/step_00000002")
    run_world(train_and_report, 1, again)
    assert metrics(tmp_path / "run") == before


@pytest.mark.parametrize(("victim", "where"), [(0, "write_tensor_file"), (1, "write_tensor_file"), (0, "file_entry")])
def test_a_save_that_is_killed_leaves_the_one_before(victim: int, where: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(
        corpus, tmp_path / "run", train_iters=5, save_interval=2, pipeline_model_parallel_size=2, lr_decay_iters=5
    )
    with pytest.raises(WorldError) as failed:
        run_world(train_and_die_while_saving, 2, values, 4, victim, where)
    assert 9 in failed.value.codes
    saved = tmp_path / "run" / "checkpoints"
    assert find_checkpoint(saved).name == "step_00000002"
    assert (saved / "latest").read_text() == "step_00000002"
    assert [path.name for path in saved.glob("step_*")] == ["step_00000002"], "no half has a checkpoint's name"

    straight = run_world(train_and_report, 2, {**values, "run-dir": tmp_path / "straight"})
    resumed = run_world(train_and_report, 2, {**values, "load": saved})
    assert_bit_equal(straight, resumed)
    assert find_checkpoint(saved).name == "step_00000005"
    assert not list(saved.glob(".*")), "what the killed save left was cleared"


@pytest.mark.parametrize(("wrote", "reads"), [(3, 1), (1, 3), (2, 1)])
def test_a_checkpoint_moves_to_another_zero_stage(wrote: int, reads: int, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")

    def values(stage: int, name: str, **changes: Any) -> dict[str, Any]:
        zero = tmp_path / f"zero{stage}.json"
        settings = {"stage": stage}
        if stage == 3:
            settings["stage3_param_persistence_threshold"] = 0  # partition the small parameters too
        zero.write_text(json.dumps({"zero_optimization": settings}))
        return run_flags(
            corpus, tmp_path / name, **{"train_iters": 6, "lr_decay_iters": 6, "deepspeed_config": zero, **changes}
        )

    run_world(train_and_report, 2, values(wrote, "first", train_iters=3, save_interval=3))
    load = tmp_path / "first" / "checkpoints"
    run_world(train_and_report, 2, values(wrote, "same", load=load))
    run_world(train_and_report, 2, values(reads, "other", load=load))
    same, other = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("same", "other"))
    assert other == pytest.approx(same, rel=1e-5)


def test_a_save_that_is_killed_after_its_rename_is_complete(tmp_path: Path) -> None:
    values = run_flags(write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=5, save_interval=2)
    with pytest.raises(WorldError) as failed:
        run_world(train_and_die_while_saving, 1, values, 4, 0, "write_durably")
    assert failed.value.codes == [9]
    saved = tmp_path / "run" / "checkpoints"
    assert (saved / "latest").read_text() == "step_00000002"
    assert find_checkpoint(saved).name == "step_00000004"
    run_world(train_and_report, 1, {**values, "load": saved})
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("rank", "asynchronous"), [(0, False), (1, False), (1, True)])
def test_a_full_disk_on_one_rank_is_one_error_of_all(rank: int, asynchronous: bool, tmp_path: Path) -> None:
    """The run stops; the checkpoint before is whole, nothing is left of the one that failed, and the run goes on
    from there with the bits of one that never stopped, though only one checkpoint is kept."""
    values = run_flags(
        write_corpus(tmp_path / "corpus"), tmp_path / "run", train_iters=7, save_interval=2,
        pipeline_model_parallel_size=2, keep_last=1, async_save=asynchronous or None,
    )  # fmt: skip
    with pytest.raises(WorldError) as failed:
        run_world(train_with_a_full_disk, 2, values, rank, 4)
    assert failed.value.codes == [1, 1]
    error = reported_error(failed.value)
    assert error.startswith("error: --save")
    assert "File too large" in error
    assert f"_{rank:05d}.safetensors" in error, "the file is named"
    assert f"(rank {rank}, host " in error, "by the rank that has it"
    saved = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step_00000002"]
    assert metrics(tmp_path / "run")[-1]["step"] <= 5, "a failure surfaces at the next step"

    straight = run_world(train_and_report, 2, {**values, "run-dir": tmp_path / "straight"})
    assert_bit_equal(straight, run_world(train_and_report, 2, {**values, "load": saved}))


def test_another_batch_size_goes_on_where_the_data_was(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    common = {"lr_decay_iters": 6, "save": tmp_path / "saved"}
    run_world(train_and_report, 1, run_flags(corpus, tmp_path / "a", train_iters=2, **common))
    values = run_flags(corpus, tmp_path / "b", train_iters=6, global_batch_size=4, load=tmp_path / "saved", **common)
    (report,) = run_world(train_and_report, 1, values)
    lines = metrics(tmp_path / "b")
    assert [line["samples"] for line in lines] == [20, 24, 28, 32]
    assert all(line["kept_tokens"] == 4 * 16 for line in lines)
    straight = run_flags(corpus, tmp_path / "c", train_iters=4)
    (whole,) = run_world(train_and_report, 1, straight)
    assert [tokens for tokens, _ in report["kept"]] == [tokens for tokens, _ in whole["kept"]][8:16]


@pytest.mark.parametrize("change", [{"seed": 5}, {"seq_length": 8}, {"split": "9,1,0"}, {"packing": "best-fit"}])
def test_another_order_of_samples_is_refused_or_accepted_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_world(train_and_report, 1, run_flags(corpus, tmp_path / "a", train_iters=2, save=tmp_path / "saved"))
    resume = {
        "load": tmp_path / "saved",
        "lr_decay_iters": 3,
        "train_iters": 3,
        "max_position_embeddings": 16,
        **change,
    }
    with pytest.raises(WorldError, match="accept-new-sample-order"):
        run_world(train_and_report, 1, run_flags(corpus, tmp_path / "b", **resume))
    run_world(train_and_report, 1, run_flags(corpus, tmp_path / "b", **resume, accept_new_sample_order=True))


def test_a_run_may_be_extended_beyond_the_epochs_it_was_laid_out_for(tmp_path: Path) -> None:
    """The samples already drawn do not come again before their epoch is over, and the others all come."""
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(corpus, tmp_path / "a", train_iters=2, save=tmp_path / "saved", num_layers=1)
    (first,) = run_world(train_and_report, 1, values)
    (rest,) = run_world(train_and_report, 1, {**values, "train-iters": 20, "load": tmp_path / "saved"})
    batches = [tokens for report in (first, rest) for tokens, _ in report["kept"]]
    samples = [batch[row * 128 : (row + 1) * 128] for batch in batches for row in (0, 1)]
    epoch = (sum(np.fromfile(f"{corpus}.bin", np.uint16).shape) - 1) // 16
    assert 16 < epoch < len(samples) == 160
    assert len(set(samples[:epoch])) == epoch


def test_a_folder_with_a_later_checkpoint_is_not_mixed_up(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    saved = tmp_path / "saved"
    run_world(train_and_report, 1, run_flags(corpus, tmp_path / "a", train_iters=3, save=saved, save_interval=1))
    for changes in ({"seed": 7}, {"load": saved / "step_00000001", "save_interval": 1}):
        values = run_flags(corpus, tmp_path / "b", **{"train_iters": 3, "save": saved, **changes})
        with pytest.raises(WorldError, match="contain no checkpoint beyond the step that the run starts from"):
            run_world(train_and_report, 2, values)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_before_any_update_resumes(stage: int, tmp_path: Path) -> None:
    """Every step so far was skipped: there are weights and no moments."""
    corpus = write_corpus(tmp_path / "corpus")
    common = {"lr_decay_iters": 3, "deepspeed_config": zero_config(stage)}
    values = run_flags(corpus, tmp_path / "a", train_iters=1, save=tmp_path / "saved", **common)
    run_world(train_with_one_bad_step, 2, values)
    assert metrics(tmp_path / "a")[0]["skipped_steps"] == 1
    resumed = run_flags(corpus, tmp_path / "b", train_iters=3, load=tmp_path / "saved", **common)
    run_world(train_and_report, 2, resumed)
    assert [line["skipped_steps"] for line in metrics(tmp_path / "b")] == [1, 1]


def train_with_one_bad_step(values: dict[str, Any]) -> None:
    from megatron_slm.loss import selective_ce

    real = selective_ce.backward_pass

    def bad(*args: Any, **kwargs: Any) -> Any:
        hidden, weight = real(*args, **kwargs)
        return hidden * float("nan"), weight

    selective_ce.backward_pass = bad
    train_and_report(values)


def test_adams_step_is_where_its_kernel_reads_it() -> None:
    import torch

    from megatron_slm.checkpoint.fragments import Fragment, _prepare_state

    class Holder:
        pass

    for fused, device in ((True, "meta"), (False, "cpu")):
        flat, optimizer = torch.zeros(4, device="meta"), Holder()
        optimizer.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        optimizer.optimizer.param_groups = [{"fused": fused}]
        fragment = Fragment(parameter=torch.nn.Parameter(flat), begin=0, end=4, flat=flat, offset=0, state={})
        _prepare_state(fragment, optimizer, 3)
        assert fragment.state["step"].device.type == device


def test_weights_start_a_new_run_at_any_layout(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_world(train_and_report, 2, run_flags(corpus, tmp_path / "a", save_interval=5, pipeline_model_parallel_size=2))
    start = {"init_from": tmp_path / "a" / "checkpoints", "train_iters": 2}
    run_world(train_and_report, 1, run_flags(corpus, tmp_path / "one", **start))
    run_world(train_and_report, 2, run_flags(corpus, tmp_path / "two", **start, tensor_model_parallel_size=2))
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    assert one[0] < metrics(tmp_path / "a")[0]["loss"]
