"""The loading benchmark: its share of waiting is of a real run, and its report says what was measured."""

from __future__ import annotations

import pytest

from tests.tools.forked_benchmarks import benchmark, fork_ranks

data_loading = benchmark("data-loading")


def test_waiting_is_measured_within_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
    found = data_loading.measure_share(num_steps=2, seq_length=32)
    for record in found["runs"].values():
        assert 0 < record["share_of_the_time"] < 1
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(4 * 32)


def test_index_in_a_process_and_the_report() -> None:
    index = data_loading.measure_index(10**5, 100)
    assert index["samples"] == 48
    assert all(index[state]["seconds"] > 0 for state in ("in memory", "cache made", "cache read"))
    blend = data_loading.measure_blend(1000, data_loading.uneven_weights(300))
    assert (blend["corpora"], blend["samples"]) == (300, 1000)
    run = {"share_of_the_time": 0.0125, "step_seconds": 2.0, "tokens_per_second": 64.0}
    share = {"micro_batches": 4, "seq_length": 32, "runs": {"2 threads": run}}
    loading = {"micro_batch_size": 4, "seq_length": 2048, "best-fit": {"milliseconds": 1.5, "tokens_per_second": 2e6}}
    text = data_loading._markdown([index], [blend], loading, share, 7.25)
    assert "7.2 processes running on average" in text
    assert "| 300 | 1,000 | " in text
    assert "| best-fit | 1.50 | 2.0 |" in text
    assert "| 2 threads | 1.250% | 2.00 s | 64 |" in text
