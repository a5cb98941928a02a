"""Run folders, finished or not, and the report made of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.analysis.run_report import panels, summary, tokens_to_reach
from megatron_slm.analysis.runs import MAX_POINTS, Series, read_run, read_runs
from megatron_slm.analysis.verdict import verdict
from megatron_slm.cli.report import main
from megatron_slm.errors import AnalysisError


def write_run(folder: Path, *, steps: int = 40, planned: int = 40, final: float = 1.0, keep: float = 1.0) -> Path:
    """A run whose held-out loss is `final + 4 / 2**(tokens in thousands / 8)`, evaluated every 8 steps."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": step * 1000, "loss": 2.0, "loss_all": 2.0, "kept_tokens": 1000 * keep}
        line |= {"valid_tokens": 1000, "tokens_per_second": 500.0, "step_time_seconds": 2.0, "grad_norm": None}
        line |= {"loss_unselected": 5.0 if keep < 1 else None, "skipped_steps": 0}
        lines.append(line)
        if step % 8 == 0:
            loss = final + 4 / 2 ** (step / 8)
            lines.append({"event": "eval", "step": step, "tokens": step * 1000, "set": "target", "loss": loss})
            lines.append({"event": "probe", "step": step, "tokens": step * 1000, "agreement": 0.9, "kept_tokens": 6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"train-iters: {planned}\nobjective: slm\nslm-keep-ratio: {keep}\n")
    return folder


def test_axes(tmp_path: Path) -> None:
    """A step's place on every axis, also between and after the logged steps."""
    run = read_run(write_run(tmp_path / "run", keep=0.5))
    assert [run.position(axis, 20) for axis in ("steps", "tokens", "trained-tokens")] == [20, 0.02, pytest.approx(0.01)]
    assert run.position("hours", 40) == pytest.approx(80 / 3600)
    assert run.position("tokens", 99) == pytest.approx(0.04)


def test_steps_between_logged_ones_count(tmp_path: Path) -> None:
    """With --log-interval 10 a line stands for the ten steps up to it."""
    folder = write_run(tmp_path / "run")
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] % 10 == 0]
    (folder / "metrics.jsonl").write_text("\n".join(kept))
    run = read_run(folder)
    assert run.position("hours", 40) == pytest.approx(80 / 3600)
    assert run.position("trained-tokens", 40) == pytest.approx(0.04)
    assert run.position("tokens", 25) == pytest.approx(0.025)


def test_a_half_finished_run(tmp_path: Path) -> None:
    """Its last line may be cut off; it says how far it is."""
    folder = write_run(tmp_path / "run", steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tok')
    run = read_run(folder)
    assert (run.status, run.unreadable_lines, run.last_step) == ("10 of 40 steps", 1, 10)
    assert summary(run)["held_out"] == {"target": pytest.approx(1 + 4 / 2)}
    assert read_run(write_run(tmp_path / "whole")).status == "complete, 40 steps"


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=5000, planned=5000))
    curve = run.metric("loss_all", "steps")
    assert len(curve.x) <= MAX_POINTS
    assert curve.x[-1] == 5000
    assert all(a < b for a, b in zip(curve.x, curve.x[1:], strict=False))


def test_a_curve_reaches_a_value_between_its_points() -> None:
    curve = Series((1.0, 2.0, 4.0), (5.0, 3.0, 1.0))
    assert [curve.reaches(value) for value in (6.0, 4.0, 3.0, 2.0, 0.5)] == [1.0, 1.5, 2.0, 3.0, None]


def test_tokens_to_reach_the_baselines_loss(tmp_path: Path) -> None:
    """Halving every 8 steps: the better run passes the baseline's last loss where its curve says so."""
    runs = read_runs([str(write_run(tmp_path / "clm")), str(write_run(tmp_path / "slm", final=0.5, keep=0.6))])
    rows = tokens_to_reach(runs, {"target": [0.1]})
    row = next(row for row in rows if row["target"] == "last loss of clm")
    target = 1 + 4 / 32
    before, after = 0.5 + 4 / 4, 0.5 + 4 / 8
    expected = 16 + 8 * (before - target) / (before - after)
    assert row["million_tokens"] == {"clm": pytest.approx(0.04), "slm": pytest.approx(expected / 1000)}
    assert row["ratio"] == {"clm": 1.0, "slm": pytest.approx(expected / 40)}
    assert next(row for row in rows if row["target"] == "last loss of slm")["ratio"] == {"clm": None, "slm": None}
    assert next(row for row in rows if row["loss"] == 0.1)["million_tokens"] == {"clm": None, "slm": None}


def test_only_charts_with_something_in_them(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    titles = [panel.title for panel in panels([run], "tokens")]
    assert "Held-out loss: target" in titles
    assert "Selection unchanged since the last probe" in titles
    assert not {"Training loss, tokens not kept", "Gradient norm before clipping"} & set(titles)


@pytest.mark.parametrize("axis", ["tokens", "trained-tokens", "hours", "steps"])
def test_the_command(tmp_path: Path, axis: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Page, picture and table; the page needs no other file, and names what is unfinished."""
    clm, slm = write_run(tmp_path / "clm"), write_run(tmp_path / "slm", steps=20, keep=0.6)
    assert main([str(clm), f"mine<b>={slm}", "--x-axis", axis, "--target-loss", "target=1.4"]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (clm / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "mine&lt;b&gt; is not finished: 20 of 40 steps" in page
    assert "<b>" not in page
    assert (clm / "report.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((clm / "report.json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["clm", "mine<b>"]
    assert numbers["runs"][0]["million_trained_tokens"] == pytest.approx(0.04)
    assert not [path for path in clm.iterdir() if path.name.endswith(".tmp")]


def test_the_page_opens_with_what_the_comparison_comes_to(tmp_path: Path) -> None:
    """clm ends at 1.125 nats and slm at 0.625, which passes 1.125 between its second and third evaluation."""
    clm, slm = write_run(tmp_path / "clm"), write_run(tmp_path / "slm", final=0.5, keep=0.6)
    (sentence,) = verdict(read_runs([str(clm), str(slm)]))
    reached = 16 + 8 * (1.5 - 1.125) / (1.5 - 1.0)
    assert sentence == (
        f"slm predicts held-out target text better than clm: the right token is {math.exp(0.5):.2f} times as likely "
        f"(0.625 against 1.125 nats per token), and reached its loss with {reached / 40:.0%} of the tokens."
    )
    (worse,) = verdict(read_runs([str(slm), str(clm)]))
    assert "target text worse than slm: the right token is 0.61 times as likely" in worse
    (same,) = verdict(read_runs([str(clm), f"again={clm}"]))
    assert same == "again predicts held-out target text as well as clm does (1.125 against 1.125 nats per token)."
    (alone,) = verdict(read_runs([str(slm)]))
    assert alone == (
        "slm has read 40,000 tokens and trained on 60% of them; its loss on held-out target text went from 2.500 to "
        "0.625 nats per token (lower is better)."
    )
    assert main([str(clm), str(slm)]) == 0
    text = (clm / "report.html").read_text()
    assert text.index("slm predicts held-out") < text.index("These are single runs") < text.index("<table>")


def test_runs_without_a_common_set_are_not_compared(tmp_path: Path) -> None:
    clm, slm = write_run(tmp_path / "clm"), write_run(tmp_path / "slm", steps=1)
    assert list(verdict(read_runs([str(clm), str(slm)]))) == [
        "slm and clm cannot be compared: they have no held-out text in common."
    ]


def test_exact_and_sampled_rows_are_compared(tmp_path: Path) -> None:
    exact, sampled = write_run(tmp_path / "exact"), write_run(tmp_path / "sampled", final=1.01)
    assert main([str(exact), str(sampled)]) == 0
    assert "sampled backward pass" not in (exact / "report.html").read_text()
    lines = [json.loads(line) for line in (sampled / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "event" not in line:
            line |= {"backward_row_share": 0.5 if line["step"] % 2 else 0.7, "backward_added_variance": 0.02}
            line |= {"tokens_per_second": 600.0, "clipped_share": 0.25}
    (sampled / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (sampled / "config.yaml").open("a") as file:
        file.write("backward-rows: sampled\n")
    assert main([str(exact), str(sampled)]) == 0
    text = (exact / "report.html").read_text()
    section = text[text.index("Exact and sampled backward pass") : text.index("Tokens to reach")]
    cells = re.findall(r"<td>(.*?)</td>", section)
    assert "Training report: exact and sampled" in text
    assert cells[:8] == ["exact", "exact", "100%", "–", "–", "–", "500", "1.1250"]
    assert cells[8:] == ["sampled", "sampled", "60%", "0.02", "–", "25%", "600 (1.20x)", "1.1350 (+0.0100)"]
    numbers = json.loads((exact / "report.json").read_text())["runs"]
    assert (numbers[0]["backward_rows"], numbers[1]["backward_row_share"]) == ("exact", pytest.approx(0.6))


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """One step, nothing evaluated: a page all the same."""
    folder = write_run(tmp_path / "run", steps=1)
    assert main([str(folder)]) == 0
    assert "no held-out losses yet" in (folder / "report.html").read_text()


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "eval", "step": 40, "tokens": 40000, "set": "target", "loss": None}) + "\n")
    assert all(math.isfinite(loss) for loss in read_run(folder).held_out("target").y)
    assert main([str(folder)]) == 0


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnalysisError, match=r"RUN is .*: must be a run's folder"):
        read_run(tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("{nonsense\n")
    with pytest.raises(AnalysisError, match=r"number of readable lines is 0: must be at least 1"):
        read_run(tmp_path / "empty")
    one = write_run(tmp_path / "a" / "run")
    two = write_run(tmp_path / "b" / "run")
    with pytest.raises(AnalysisError, match="RUN: name is 'run': must differ"):
        read_runs([str(one), str(two)])
    for bad in ("other=1.0", "target=-1", "target=x"):
        assert main([str(one), "--target-loss", bad]) == 1
        assert "error: --target-loss" in capsys.readouterr().err
