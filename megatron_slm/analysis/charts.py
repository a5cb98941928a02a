"""Line charts and histograms: each panel as SVG for pages, all together as one PNG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for every common kind of color blindness. Markers tell curves apart without color.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _GREY, _GRID = "#374151", "#9ca3af", "#e5e7eb"
_LABEL_HEIGHT = 0.068
"""Share of the axis height that a label takes."""
_MAX_LABELED = 6
"""Largest number of curves labeled at their ends; more get a legend."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = COLORS[0]
    style: str = "-"
    marker: str = ""
    low: Sequence[float] | None = None
    """Lower edge of a band around the curve, with `high` as its upper edge."""
    high: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """One histogram of a chart, drawn as filled steps."""

    name: str
    edges: Sequence[float]
    """Edges of the bins [n + 1]."""
    counts: Sequence[float]
    """Values in each bin [n]."""
    color: str = COLORS[0]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: curves, or histograms."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve] = ()
    hides_start: bool = False
    """Fit the y axis without the first fifth of each curve: losses of barely trained models would flatten the rest."""
    histograms: Sequence[Histogram] = ()

    def describe(self) -> str:
        """Return the panel's content as text, for screen readers."""
        ends = [f"{curve.name} ends at {_short(curve.y[-1])}" for curve in self.curves if len(curve.y)]
        names = [histogram.name for histogram in self.histograms]
        return f"{self.title}. {self.y_label} against {self.x_label}. {'; '.join(ends or names)}"


def svg(panel: Panel) -> bytes:
    """Draw one panel as SVG; equal panels give equal bytes."""
    with _drawing():
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        _draw(figure.subplots(), panel)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def png(panels: Sequence[Panel], *, columns: int = 2) -> bytes:
    """Draw all panels in a grid as PNG."""
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
    """Draw dollar signs in tokens as text, and characters missing from the font as boxes without a warning."""
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
    if panel.histograms:
        _draw_histograms(axes, panel.histograms)
    curves = [curve for curve in panel.curves if len(curve.x)]
    for curve in curves:
        axes.plot(
            curve.x, curve.y, curve.style, color=curve.color, lw=1.8, marker=curve.marker, ms=4, label=curve.name,
            markevery=max(1, len(curve.x) // 12),
        )  # fmt: skip
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=curve.color, alpha=0.18, lw=0)
    if not curves:
        return
    _fit_y_axis(axes, curves, hides_start=panel.hides_start)
    if len(curves) > _MAX_LABELED:
        axes.legend(fontsize=8, frameon=False)
    else:
        _label_ends(axes, curves)


def _draw_histograms(axes: Axes, histograms: Sequence[Histogram]) -> None:
    hatches = ("", "///", "...", "xxx")
    for i, histogram in enumerate(histograms):
        options: dict[str, Any] = {"fill": True, "alpha": 0.45, "hatch": hatches[i % len(hatches)]}
        axes.stairs(histogram.counts, histogram.edges, color=histogram.color, lw=1.3, label=histogram.name, **options)
    axes.legend(fontsize=8.5, frameon=False)


def _fit_y_axis(axes: Axes, curves: Sequence[Curve], *, hides_start: bool) -> None:
    low = min(min(curve.low or curve.y) for curve in curves)
    high = -math.inf
    for curve in curves:
        start = len(curve.y) // 5 if hides_start else 0
        high = max(high, *(curve.high or curve.y)[start:])
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 0.1
    axes.set_ylim(low - margin, high + margin)
    for curve in curves:
        _mark_extreme(axes, curve, high + margin)


def _mark_extreme(axes: Axes, curve: Curve, top: float) -> None:
    """Mark a curve that leaves the axis at its top with a triangle there and its greatest value."""
    greatest = max(curve.y)
    if greatest <= top:
        return
    x = curve.x[list(curve.y).index(greatest)]
    axes.plot([x], [top], marker="^", color=curve.color, ms=6, clip_on=False, zorder=3)
    axes.annotate(
        f"to {_short(greatest)}", (x, top), xytext=(6, -3), textcoords="offset points", color=curve.color, fontsize=8,
        va="top", annotation_clip=False,
    )  # fmt: skip


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write the name and the last value beside every curve, without overlaps."""
    to_axes = axes.transData + axes.transAxes.inverted()
    height = -math.inf
    ends = [(float(to_axes.transform((curve.x[-1], curve.y[-1]))[1]), curve) for curve in curves]
    for end, curve in sorted(ends, key=lambda pair: pair[0]):
        height = max(end, height + _LABEL_HEIGHT)
        axes.text(
            1.012, height, f"{curve.name} {_short(curve.y[-1])}", color=curve.color, va="center", fontsize=9,
            transform=axes.transAxes,
        )  # fmt: skip


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
