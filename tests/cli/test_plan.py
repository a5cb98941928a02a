"""The command as a user runs it: tables, JSON, and one clear error for each thing that is wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.plan import main
from megatron_slm.planning.known_models import KNOWN_MODELS

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = LLAMA_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}
RUN = """
init-from: nowhere/model
reference-load: nowhere/reference
slm-keep-ratio: 0.7
seq-length: 4096
global-batch-size: 256
micro-batch-size: 1
train-iters: 15000
bf16: true
tensor-model-parallel-size: 4
pipeline-model-parallel-size: 2
sequence-parallel: true
"""


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    for name, config in (("model", LLAMA_7B), ("reference", TINY)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text(RUN)
    shapes = ["--model-config", str(tmp_path / "model/config.json"), "--reference-config", str(tmp_path / "reference")]
    return ["--config", str(tmp_path / "run.yaml"), "--gpu", "h100", "--json", "-", *shapes]


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(list(argv)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_layout_of_a_7b_run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "layout", "--nodes", "4", *argv)
    assert plan["assumed"]["efficiency"] is None
    assert plan["layout"] | {"tensor": 4, "pipeline": 2, "data": 4, "num_micro_batches": 64} == plan["layout"]
    first, last = plan["stages"]
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert first["parameters"] == 2 * ((16 * block + 32000 * 4096) // 4 + 16 * 2 * 4096)
    assert first["gradients"] == 2 * first["parameters"]  # 4 bytes for 2: bf16 gradients are freed as they are added
    assert first["optimizer"] == 6 * first["parameters"] // 4  # 12 bytes for 2, over 4 ranks
    assert (first["loss_head"], last["loss_head"] > 0) == (0, True)
    assert 0 < first["reference"] < first["parameters"] / 4
    assert plan["days"] == pytest.approx(15000 * plan["step_seconds"]["total"] / 86400)
    assert plan["gpu_hours"] == pytest.approx(plan["days"] * 24 * 32)
    assert plan["tokens_per_second"] == pytest.approx(256 * 4096 / plan["step_seconds"]["total"])
    assert 0.2 < plan["mfu"] < 0.4  # bubbles, collectives, the reference


def test_what_is_assumed_moves_the_plan(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = (
        planned(capsys, "layout", "--nodes", "4", *argv, "--efficiency", share)["step_seconds"]["schedule"]
        for share in ("0.25", "0.5")
    )
    assert 1.5 < slow / fast < 2.0  # computations halve, collectives do not


def test_run_flags_win_over_the_file(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "layout", "--nodes", "4", *argv, "--micro-batch-size", "2")
    assert (plan["layout"]["micro_batch_size"], plan["layout"]["num_micro_batches"]) == (2, 32)
    whole = planned(capsys, "layout", "--nodes", "4", *argv)
    recomputed = planned(capsys, "layout", "--nodes", "4", *argv, "--recompute-granularity", "full")
    assert recomputed["stages"][0]["activations"] < whole["stages"][0]["activations"] / 5
    assert recomputed["step_seconds"]["schedule"] > 1.1 * whole["step_seconds"]["schedule"]


def test_tables_say_what_is_assumed(argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv[argv.index("-")] = str(tmp_path / "plan.json")
    assert main(["layout", "--nodes", "4", *argv]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Assumed, not measured: a roofline of h100 in forward" in text
    assert "activations in flight" in text
    assert "GPU-hours" in text
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]


def test_search_finds_the_best_of_all_layouts(
    argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = planned(capsys, "search", "--nodes", "1", *argv, "--top", "3")["layouts"]
    assert len(found) == 3
    steps = [plan["step_seconds"]["total"] for plan in found]
    assert steps == sorted(steps)
    assert all(plan["fits"] and plan["peak_bytes"] <= plan["usable_bytes"] for plan in found)
    for plan in found:  # what is proposed can be asked for, and is planned the same
        flags = [f"--{name}={value}" for name, value in plan["flags"].items() if value is not True]
        sequence = "--sequence-parallel" if "sequence-parallel" in plan["flags"] else "--no-sequence-parallel"
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": plan["layout"]["zero_stage"]}}))
        config = ["--deepspeed-config", str(tmp_path / "ds.json")]
        again = planned(capsys, "layout", "--nodes", "1", *argv, *flags, sequence, *config)
        assert again["peak_bytes"] == pytest.approx(plan["peak_bytes"], rel=0.01)
        assert again["step_seconds"]["total"] == pytest.approx(plan["step_seconds"]["total"], rel=0.01)
    configured = planned(capsys, "layout", "--nodes", "1", *argv)
    assert steps[0] <= configured["step_seconds"]["total"]


def test_a_thousand_ranks_in_seconds(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    plan = planned(capsys, "layout", "--nodes", "128", *argv, "--global-batch-size", "1024")
    assert plan["layout"]["data"] == 128
    assert time.process_time() - started < 20


def test_a_layout_that_does_not_fit(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv[argv.index("h100")] = "rtx4090"
    one_rank = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--no-sequence-parallel"]
    assert main(["layout", "--gpus-per-node", "1", *argv, *one_rank]) == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["fits"]
    assert "error: memory per rank" in captured.err
    assert main(["search", "--gpus-per-node", "1", *argv]) == 1
    assert "the smallest needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--nodes", "0"], "--nodes is 0: must be at least 1"),
        (["--efficiency", "1.5"], "--efficiency is 1.5: must be in (0, 1]"),
        (["--gpus-per-node", "3"], "world size is 3"),
        (["--micro-batch-size", "3"], "--global-batch-size is 256"),
        (["--model-config", "nowhere"], "--model-config is 'nowhere'"),
        (["--pipeline-model-parallel-size", "64", "--nodes", "32"], "--pipeline-model-parallel-size is 64"),
        (["--pipeline-paralel", "2"], "did you mean --pipeline-model-parallel-size?"),
        (["--json", "nowhere/plan.json"], "--json is 'nowhere/plan.json'"),
    ],
)
def test_what_is_wrong_is_named(
    argv: list[str], capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        at = argv.index(flag) if flag in argv else len(argv)
        argv[at : at + 2] = [flag, value]
    assert main(["layout", *argv]) == 1
    assert message in capsys.readouterr().err


def test_folders_that_are_not_here_have_another_way_in(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    at = argv.index("--model-config")
    assert main(["layout", *argv[:at], *argv[at + 2 :]]) == 1
    assert "--init-from is 'nowhere/model'" in (error := capsys.readouterr().err)
    assert "use --model-config" in error


def test_a_model_of_flags_needs_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = "examples/quickstart/train.yaml"
    run = ["--config", config, "--gpu", "a100-40g", "--gpus-per-node", "2", "--objective", "clm", "--json", "-"]
    assert main(["layout", *run, "--tokenizer-model", str(tmp_path / "none")]) == 1
    assert "--vocab-size is missing: required by a plan without --init-from" in capsys.readouterr().err
    plan = planned(capsys, "layout", *run, "--vocab-size", "2048")
    assert plan["stages"][0]["reference"] == 0
    assert plan["step_over_clm"] == 1.0


def test_stored_scores_take_the_place_of_the_reference(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "layout", "--nodes", "4", *argv, "--reference-scores", "nowhere")
    assert [stage["reference"] for stage in plan["stages"]] == [0, 0]
    assert plan["step_over_clm"] == 1.0


def test_names_and_flags_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--gpu", "h100", "--seq-length", "2048", "--global-batch-size", "64", "--train-iters", "10", "--json", "-"]
    plan = planned(capsys, "layout", *run, "--model-config", "Llama-3.2-1B", "--reference-config", "llama-3.2-1b")
    assert plan["stages"][0]["reference"] > 2 * KNOWN_MODELS["llama-3.2-1b"].num_parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("tinyllama-1.1b", 1_100_048_384),
        ("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192),
        ("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496),
        ("mistral-7b-v0.1", 7_241_732_096), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512),
        ("smollm3-3b", 3_075_098_624), ("phi-4-mini", 3_836_021_760), ("granite-3.1-8b", 8_170_848_256),
        ("glm-4-9b-0414", 9_400_279_040), ("olmo-2-7b", 7_298_617_344), ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-1b", 999_885_952), ("phi-4", 14_659_507_200), ("ministral-8b-2410", 8_019_808_256),
        ("olmo-3-7b", 7_298_011_136),
    ],
)  # fmt: skip
def test_known_models_have_their_published_sizes(name: str, published: int) -> None:
    assert KNOWN_MODELS[name].num_parameters == published


@pytest.mark.parametrize("name", ["smollm3-3b", "phi-4-mini", "phi-4", "ministral-8b-2410", "granite-3.1-8b",
                                  "glm-4-9b-0414", "olmo-2-7b", "olmo-3-7b", "gemma-2-9b", "gemma-3-1b"])  # fmt: skip
def test_families_are_planned_at_their_real_sizes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        "--gpu",
        "h100",
        "--nodes",
        "2",
        "--bf16",
        "--objective",
        "clm",
        "--seq-length",
        "4096",
        "--train-iters",
        "10",
    ]
    run += ["--global-batch-size", "64", "--micro-batch-size", "1", "--recompute-granularity", "full", "--json", "-"]
    model = KNOWN_MODELS[name]
    one = planned(capsys, "layout", *run, "--model-config", name, "--tensor-model-parallel-size", "2")["stages"]
    assert one[0]["parameters"] == pytest.approx(model.num_parameters, rel=2e-4), "2 bytes of half of them, norms twice"
    two = planned(capsys, "layout", *run, "--model-config", name, "--pipeline-model-parallel-size", "2")["stages"]
    again = model.vocab_size * model.hidden_size * model.tied  # on the last stage too
    assert sum(stage["parameters"] for stage in two) == pytest.approx(2 * (model.num_parameters + again), rel=2e-4)
