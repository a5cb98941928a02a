"""Charts show what lies outside of their axes, and numbers in units that fit."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from megatron_slm.analysis.charts import Curve, Panel, _draw
from megatron_slm.analysis.run_report import _tokens


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


@pytest.mark.parametrize(
    ("millions", "text"),
    [(None, "–"), (0.012288, "12,288"), (3.4, "3.40 M"), (999.0, "999.00 M"), (15000.0, "15.00 B")],
)
def test_tokens_have_units_that_fit(millions: float | None, text: str) -> None:
    assert _tokens(millions) == text
