"""Data-parallel ranks read a model together: each of its numbers is read by one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint import fragments
from megatron_slm.flags.load import parse
from megatron_slm.training.pretrain import prepare
from tests.support.runs import flags, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.training import train_and_report
from tests.support.world import run_world

STAGES = (1, 3)
FROM_THE_MODEL = dict.fromkeys(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
)


def numbers_read(runs: list[dict[str, Any]]) -> list[tuple[Counter[str], int]]:
    """Numbers that this rank reads while runs are built, by quantity, and the size of the model."""
    real, found = fragments.copy_range, []
    for values in runs:
        read: Counter[str] = Counter()

        def counting(*arguments: Any, read: Counter[str] = read) -> None:
            _, _, _, quantity, begin, end = arguments
            read[quantity] += end - begin
            real(*arguments)

        fragments.copy_range = counting
        run = prepare(parse(flags(values))[0])
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in run.trainer.engine.module.parameters())
        found.append((read, numel))
    return found


def test_each_number_is_read_by_one_rank(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    saved = run_flags(corpus, tmp_path / "saved", bf16=True, train_iters=1, save_interval=1)
    run_world(train_and_report, 1, saved)
    runs = [
        run_flags(corpus, tmp_path / f"{stage} {name}", bf16=True, deepspeed_config=zero_config(stage), **source)
        for stage in STAGES
        for name, source in {
            "import": {"init_from": save_hf_llama(tmp_path / "model"), **FROM_THE_MODEL},
            "resume": {"load": tmp_path / "saved" / "checkpoints"},
        }.items()
    ]
    one, other = run_world(numbers_read, 2, runs)
    for (read, numel), (read_by_other, _), values in zip(one, other, runs, strict=True):
        quantities = ("weight", "exp_avg", "exp_avg_sq") if "load" in values else ("weight",)
        assert read + read_by_other == Counter(dict.fromkeys(quantities, numel))
        assert 0.4 * numel < read["weight"] < 0.6 * numel
