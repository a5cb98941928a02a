"""Line charts and histograms, one panel each, as SVG for pages and together as a PNG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for every common kind of colour blindness. Markers say the same again.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _GREY, _GRID = "#374151", "#9ca3af", "#e5e7eb"
_LABELLED = 6
"""Up to this many lines are labelled at their ends, more in a legend."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = COLOURS[0]
    style: str = "-"
    marker: str = ""
    low: Sequence[float] | None = None
    """With `high`: a band around the curve."""
    high: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: curves, or bars where there are `bars`."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = ()
    hides_start: bool = False
    """Leave out the values of almost untrained models, which would flatten the part that tells runs apart."""
    bars: Sequence[tuple[str, Sequence[float], Sequence[float], str]] = field(default_factory=tuple)
    """Histograms: name, edges [n + 1], heights [n], colour; drawn as steps with a filling."""

    def describe(self) -> str:
        """The panel in words, for those who cannot see it."""
        ends = [f"{line.name} ends at {_short(line.y[-1])}" for line in self.lines if len(line.y)]
        names = [name for name, *_ in self.bars]
        return f"{self.title}. {self.y_label} against {self.x_label}. {'; '.join(ends or names)}"


def svg(panel: Panel) -> bytes:
    """One panel as SVG, the same bytes for the same panel."""
    with _drawing():
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        _draw(figure.subplots(), panel)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def png(panels: Sequence[Panel], *, columns: int = 2) -> bytes:
    """All panels in a grid as PNG."""
    columns = min(columns, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    with _drawing():
        figure = Figure(figsize=(6.2 * columns, 3.9 * rows), dpi=130, layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


@contextmanager
def _drawing() -> Iterator[None]:
    """A token with a dollar is no formula, and one that the font lacks is drawn as a box, without a word."""
    settings: dict[Any, Any] = {"svg.hashsalt": "megatron_slm", "svg.fonttype": "path", "text.parse_math": False}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(panel.x_label, color=_INK)
    axes.set_ylabel(panel.y_label, color=_INK)
    axes.tick_params(color=_GREY, labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_GREY)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.bars:
        _draw_bars(axes, panel)
    lines = [line for line in panel.lines if len(line.x)]
    for line in lines:
        axes.plot(
            line.x, line.y, line.style, color=line.colour, lw=1.8, marker=line.marker, ms=4, label=line.name,
            markevery=max(1, len(line.x) // 12),
        )  # fmt: skip
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.18, lw=0)
    if not lines:
        return
    _limit(axes, lines, hides_start=panel.hides_start)
    if len(lines) > _LABELLED:
        axes.legend(fontsize=8, frameon=False)
    else:
        _label_ends(axes, lines)


def _draw_bars(axes: Axes, panel: Panel) -> None:
    hatches = ("", "///", "...", "xxx")
    for i, (name, edges, heights, colour) in enumerate(panel.bars):
        options: dict[str, Any] = {"fill": True, "alpha": 0.45, "hatch": hatches[i % len(hatches)], "label": name}
        axes.stairs(heights, edges, color=colour, lw=1.3, **options)
    axes.legend(fontsize=8.5, frameon=False)


def _limit(axes: Axes, lines: Sequence[Line], *, hides_start: bool) -> None:
    late = [value for line in lines for value in list(line.high or line.y)[len(line.y) // 5 if hides_start else 0 :]]
    low = min(value for line in lines for value in (line.low or line.y))
    high = max(late)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 0.1
    axes.set_ylim(low - margin, high + margin)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """A name and the last value beside every curve, moved apart where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    height = -math.inf
    ends = [(float(to_axes.transform((line.x[-1], line.y[-1]))[1]), line) for line in lines]
    for place, line in sorted(ends, key=lambda end: end[0]):
        height = max(place, height + 0.068)
        axes.text(
            1.012, height, f"{line.name} {_short(line.y[-1])}", color=line.colour, va="center", fontsize=9,
            transform=axes.transAxes,
        )  # fmt: skip


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
