"""Charts show what lies outside of their axes, and numbers in units that fit."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from megatron_slm.analysis.run_report import _tokens
from megatron_slm.pages.charts import Curve, Panel, _draw


@pytest.mark.parametrize(("first", "marks"), [(9.0, ["to 9"]), (1.9, [])])
def test_a_peak_outside_the_axis_is_marked(first: float, marks: list[str]) -> None:
    y = [first, 1.9, *(1.9 - 0.1 * step for step in range(8))]
    axes = Figure().subplots()
    panel = Panel(title="t", x_label="x", y_label="y", curves=[Curve(name="run", x=range(10), y=y)], hides_start=True)
    _draw(axes, panel)
    top = axes.get_ylim()[1]
    assert (max(y) > top) == bool(marks)
    assert [text.get_text() for text in axes.texts if text.get_text().startswith("to ")] == marks
    at_top = [line for line in axes.lines if line.get_marker() == "^" and list(line.get_ydata()) == [top]]
    assert [list(line.get_xdata()) for line in at_top] == [[0]] * len(marks)


def test_peaks_at_one_place_are_written_below_each_other() -> None:
    axes = Figure().subplots()
    y = [1.9 - 0.1 * step for step in range(9)]
    curves = [Curve(name=f"run {first}", x=range(10), y=[first, *y]) for first in (8.0, 9.0)]
    _draw(axes, Panel(title="t", x_label="x", y_label="y", curves=curves, hides_start=True))
    heights = {text.get_text(): text.xyann[1] for text in axes.texts if text.get_text().startswith("to ")}
    assert heights["to 9"] - heights["to 8"] >= 8, "a line of text apart"


@pytest.mark.parametrize(
    ("millions", "text"),
    [(None, "–"), (0.012288, "12,288"), (3.4, "3.40 M"), (999.0, "999.00 M"), (15000.0, "15.00 B")],
)
def test_tokens_have_units_that_fit(millions: float | None, text: str) -> None:
    assert _tokens(millions) == text
