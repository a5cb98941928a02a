"""In bf16 every weight is trained: Adam's first moments are those of fp32 but for rounding, at any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.checkpoint.format import find_checkpoint
from megatron_slm.checkpoint.load import CheckpointSource
from tests.support.runs import run_flags, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import run_world


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", ["111", "211", "121"])
def test_moments_are_those_of_fp32(layout: str, tied: bool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    sources = []
    for name, num_ranks, options in (
        ("fp32", 1, {}),
        (
            "bf16",
            int(layout[0]) * int(layout[1]),
            {"bf16": True, "pipeline_model_parallel_size": layout[0], "tensor_model_parallel_size": layout[1]},
        ),
    ):
        common = {"train_iters": 1, "save_interval": 1, "no_untie_embeddings_and_output_weights": tied or None}
        run_world(train_and_report, num_ranks, run_flags(corpus, tmp_path / name, **common, **options))
        sources.append(CheckpointSource(find_checkpoint(tmp_path / name / "checkpoints")))
    assert ("lm_head.weight" in sources[0].shapes()) is not tied
    for name in sources[0].shapes():
        one, other = (source.whole(name, "exp_avg") for source in sources)
        assert (one - other).norm() <= 0.1 * one.norm(), name


def test_zero_stages_reduce_to_the_same_sums(tmp_path: Path) -> None:
    """In fp32 over data-parallel ranks; reduced in bf16, as DeepSpeed does unasked, they are 1e-3 apart."""
    corpus = write_corpus(tmp_path / "corpus")
    sources = []
    for stage in (1, 2, 3):
        options = {"train_iters": 1, "save_interval": 1, "bf16": True, "deepspeed_config": zero_config(stage)}
        run_world(train_and_report, 2, run_flags(corpus, tmp_path / str(stage), **options))
        sources.append(CheckpointSource(find_checkpoint(tmp_path / str(stage) / "checkpoints")))
    for name in sources[0].shapes():
        first, *others = (source.whole(name, "exp_avg") for source in sources)
        assert all((first - other).norm() <= 1e-5 * first.norm() for other in others), name
