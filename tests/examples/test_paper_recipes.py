"""The paper's recipes: the paper's numbers, dry runs of large worlds, and pages whose every flag exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from megatron_slm.cli.pretrain import main
from megatron_slm.convert.hf_config import architecture_of
from megatron_slm.flags.load import known_flags, parse
from megatron_slm.planning.planned_run import plan_run
from tests.data.byte_level import byte_level_folder
from tests.examples.recipes import CONFIGS, EXAMPLES, FOLDERS, ROOT, name_of
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus

PAGES = sorted([*EXAMPLES.rglob("README.md"), *EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
BATCH_TOKENS = 2**20
"""The paper's 1M."""
PAPER: dict[str, dict[str, Any]] = {
    "rho1_math_1b/reference": {"tokens": 1.5e9, "lr": 5e-5, "seq": 2048, "model": "tinyllama"},
    "rho1_math_1b/slm": {"tokens": 15e9, "lr": 8e-5, "seq": 2048, "keep": 0.6, "model": "tinyllama"},
    "rho1_math_7b/reference": {"tokens": 1.5e9, "lr": 1e-5, "seq": 4096, "model": "mistral"},
    "rho1_math_7b/slm": {"tokens": 15e9, "lr": 2e-5, "seq": 4096, "keep": 0.7, "model": "mistral"},
    "rho1_general_1b/reference": {"tokens": 5.7e9, "lr": 5e-5, "seq": 2048, "model": "tinyllama"},
    "rho1_general_1b/slm": {"tokens": 80e9, "lr": 1e-4, "seq": 2048, "keep": 0.6, "model": "tinyllama"},
    "weak_to_strong_7b/slm": {"tokens": 15e9, "lr": 2e-5, "seq": 2048, "keep": 0.7, "model": "llama2"},
    "self_reference_1b/reference": {"tokens": 1.5e9, "lr": 5e-5, "seq": 2048, "model": "tinyllama"},
    "self_reference_1b/slm": {"tokens": 15e9, "lr": 8e-5, "seq": 2048, "model": "tinyllama"},
    "stored_scores_7b/slm": {"tokens": 15e9, "lr": 2e-5, "seq": 4096, "keep": 0.7, "model": "mistral"},
}
TINYLLAMA = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, max_position_embeddings=2048
)
HF_CONFIGS = {
    "tinyllama": TINYLLAMA,
    "mistral": MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5),
    "llama2": LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5),
}
TINYLLAMA.rms_norm_eps = 1e-5


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "HOSTFILE", "GPUS", "NODES", "GPU"):
        monkeypatch.delenv(name, raising=False)


def test_every_recipe_is_known_and_whole() -> None:
    assert {name_of(path) for path in CONFIGS} == set(PAPER)
    for folder in FOLDERS:
        assert {"README.md", "run.sh", "slm.yaml"} <= {path.name for path in folder.iterdir()}
        assert f"({folder.name}/README.md)" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize("world", [8, 64, 256])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_dry_run_needs_no_files(
    config: Path, world: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    smaller = ["--micro-batch-size", "1"] if world == 256 else []
    code = main(["--config", str(config), "--dry-run", "--without-files", *smaller])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"Layout: {world} ranks" in printed.out
    for part in ("tokens of the run", "optimizer (master weights, moments)", "Not checked", "--init-from"):
        assert part in printed.out
    assert ("reference schedule" in printed.out) is ("reference-config" in config.read_text()), (
        "where a reference runs beside the model, its shape is known"
    )


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_numbers_are_the_papers(config: Path) -> None:
    paper = PAPER[name_of(config)]
    run, _ = parse(["--config", str(config)])
    training = run.training
    assert training.global_batch_size is not None
    assert training.global_batch_size * run.data.seq_length == BATCH_TOKENS
    assert run.data.seq_length == paper["seq"]
    tokens = training.train_iters * BATCH_TOKENS
    assert 0 <= tokens - paper["tokens"] < BATCH_TOKENS, "as many whole batches as hold the paper's tokens"
    assert run.optimizer.lr == paper["lr"]
    assert run.optimizer.min_lr == pytest.approx(paper["lr"] / 10)
    assert training.bf16
    assert run.checkpoint.load == run.save_folder, "one command starts and resumes"
    if "keep" in paper:
        assert run.selection.slm_keep_ratio == paper["keep"]
        assert run.selection.slm_score == ["excess"]
    if config.stem == "slm":
        text = (config.parent / "README.md").read_text()
        assert f"{tokens:,} tokens" in text
        assert f"{training.train_iters:,} steps" in text


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_shapes_are_those_of_the_models(config: Path) -> None:
    """So that --init-from, which is compared with them, is accepted."""
    run, _ = parse(["--config", str(config)])
    job = plan_run(run)
    real = HF_CONFIGS[PAPER[name_of(config)]["model"]]
    assert job.architecture == architecture_of({**real.to_dict(), "architectures": None}, "test")
    if job.reference is not None:
        small = name_of(config).startswith("weak")
        assert job.reference == (plan_run(parse(["--config", "examples/rho1_math_1b/slm.yaml"])[0]).architecture if small else job.architecture)  # fmt: skip


def test_the_blend_is_six_to_three_to_one() -> None:
    run, _ = parse(["--config", "examples/rho1_general_1b/slm.yaml"])
    assert [float(word) for word in run.data.data_path[::2]] == [0.6, 0.3, 0.1]


def test_self_reference_is_the_papers_best_setting() -> None:
    selection = parse(["--config", "examples/self_reference_1b/slm.yaml"])[0].selection
    assert selection.slm_score == ["reference-loss", "reference-entropy"]
    assert (selection.slm_combine, selection.slm_combine_ratios) == ("intersection", [0.7, 0.7])


def test_a_control_without_selection_is_a_command_away() -> None:
    words = "--config examples/rho1_math_1b/slm.yaml --objective clm --reference-load null"
    assert parse(words.split())[0].selection.objective == "clm"
    assert words.split(" ", 2)[2] in (EXAMPLES / "rho1_math_1b/README.md").read_text()


# Scripts.


def test_every_flag_in_the_pages_and_scripts_exists() -> None:
    known = set(known_flags())
    for source in (*(ROOT / "tools").glob("*.py"), *(ROOT / "megatron_slm/cli").glob("*.py"), *EXAMPLES.rglob("*.py")):  # fmt: skip
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source.read_text()))
    known |= {"--num_gpus", "--hostfile", "--no_ssh", "--node_rank", "--master_addr", "--master_port", "--log_level"}
    known |= {
        "--nodes",
        "--ntasks",
        "--ntasks-per-node",
        "--kill-on-bad-exit",
        "--job-name",
        "--gpus-per-node",
        "--signal",
    }  # SLURM
    known |= {"--exclusive", "--time", "--output", "--dependency", "--local-dir", "--fast"}  # the last of run.sh itself
    known |= {"--gpu", "--gpus-per-node", "--json"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text()))
        assert named <= known, (page, named - known)


def test_every_deepspeed_file_is_described_and_used() -> None:
    used = " ".join(
        path.read_text() for folder in ("examples", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in (".yaml", ".py")
    )  # fmt: skip
    page = (ROOT / "ds_configs/README.md").read_text()
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert f"`{path.name}`" in page
        assert f"ds_configs/{path.name}" in used


# What a dry run without files still refuses.


@pytest.mark.parametrize(
    ("changes", "world", "match"),
    [
        (["--micro-batch-size", "3"], 8, "--micro-batch-size"),
        (["--pipeline-model-parallel-size", "3"], 8, "world size is 8: must be a multiple of"),
        (["--tensor-model-parallel-size", "64"], 64, "attention heads"),
        (["--num-layers", "12", "--pipeline-model-parallel-size", "16"], 16, "16"),
        (["--reference-config", "nowhere/config.json"], 8, "--reference-config is 'nowhere/config.json'"),
        (["--deepspeed-config", "ds_configs/fp32_cpu.json"], 8, "bf16.enabled is False"),
        (["--pipeline-model-parallel-size", "2", "--deepspeed-config", "ds_configs/zero3_bf16.json"], 8, "stage is 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_file_is_refused(
    changes: list[str], world: int, match: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    words = ["--config", "examples/rho1_math_1b/slm.yaml", "--dry-run", "--without-files", *changes]
    assert main(words) == 2
    assert match in capsys.readouterr().err


def test_without_files_goes_with_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "examples/rho1_math_1b/slm.yaml", "--without-files"]) == 2
    assert "--dry-run is missing: required by --without-files" in capsys.readouterr().err


def test_a_loaded_reference_must_have_the_planned_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    reference, other = save_hf_llama(tmp_path / "reference"), save_hf_llama(tmp_path / "other", num_hidden_layers=2)
    for shape, code in ((reference, 0), (other, 2)):
        values = run_flags(
            corpus, tmp_path / "run", objective="slm", reference_load=reference, reference_config=shape / "config.json"
        )
        assert main([*flags(values), "--dry-run"]) == code
    assert "--reference-config: num_layers is 2: must be that of the loaded reference (3)" in capsys.readouterr().err


def test_a_tokenizers_size_must_be_the_one_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    tokenizer = byte_level_folder(tmp_path / "tokenizer")
    values = run_flags(corpus, tmp_path / "run", tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer)
    values["vocab-size"] = 77
    assert main([*flags(values), "--dry-run"]) == 2
    assert "--vocab-size is 77: must be the tokenizer's" in capsys.readouterr().err
