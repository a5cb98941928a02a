from __future__ import annotations

import pytest

from megatron_slm.telemetry.progress import ProgressLine, progress_text

SLM = {
    "loss": 2.0, "loss_all": 2.5, "reference_loss": 1.9, "keep_fraction": 0.6, "tokens_per_second": 1234.5, "mfu": 0.41,
}  # fmt: skip


def test_a_line_has_the_losses_the_kept_share_and_the_speed() -> None:
    assert progress_text(SLM) == "loss 2.000 (all 2.500, reference 1.900)  kept 60%  1,234 tokens/s  MFU 41%"
    plain = {"loss": 2.0, "loss_all": 2.0, "reference_loss": None, "keep_fraction": 1.0, "tokens_per_second": 9.0}
    assert progress_text({**plain, "mfu": None}) == "loss 2.000  9 tokens/s"
    assert progress_text({"loss": None, "tokens_per_second": 9.0}) == "loss -  9 tokens/s"


def test_the_time_left_follows_the_pace_since_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter((100.0, 110.0, 120.0, 130.0))
    line = ProgressLine("slm run", 4, start=0, clock=lambda: next(seconds))
    for step in range(1, 5):
        line.update(step, SLM)
    text = capsys.readouterr().err.splitlines()
    assert "left" not in text[0]
    assert text[1].endswith("0:00:20 left")
    assert text[2].endswith("0:00:10 left")
    assert "left" not in text[3]


def test_quiet_prints_only_what_is_always_printed(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("slm run", 1, start=0, quiet=True)
    line.update(1, SLM)
    line.print("held-out web: 2.1")
    line.print("warning: step 1", always=True)
    assert capsys.readouterr().err == "warning: step 1\n"
