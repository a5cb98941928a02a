"""HTML page of token dynamics: classes, curves, the text by class, and the most fluctuating tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from megatron_slm.analysis.annotated_text import NOT_PREDICTED, text_cards
from megatron_slm.analysis.dynamics import CLASSES, FALLING, HIGH, LOW, RISING, Dynamics
from megatron_slm.analysis.excerpt import Excerpt
from megatron_slm.analysis.losses import Checkpoint
from megatron_slm.files import write_durably
from megatron_slm.pages import page
from megatron_slm.pages.charts import Curve, Histogram, Panel, png, svg

_COLORS = {HIGH: "#E69F00", RISING: "#D55E00", FALLING: "#0072B2", LOW: "#555555"}
_STYLES = {HIGH: "--", RISING: ":", FALLING: "-", LOW: "-."}
_MARKERS = {HIGH: "o", RISING: "s", FALLING: "D", LOW: "^"}
_KINDS = {HIGH: "hh", RISING: "lh", FALLING: "hl", LOW: "ll"}
_MEANINGS = {
    HIGH: "H→H: stays high",
    RISING: "L→H: rises",
    FALLING: "H→L: learned",
    LOW: "L→L: already known",
}
# Hue, lightness and underline each tell the classes apart on their own.
STYLE = """
.ll { color:var(--soft) } .hl { background:#a9d4f5; color:#06283d; border-bottom:2px solid #0072B2 }
.hh { background:#fbe3b3; color:#3d2a00; border-bottom:2px dashed #8a5f00 }
.lh { background:#7a2e00; color:#fff; border-bottom:2px dotted #fff }
"""
EXAMPLES_PER_CLASS = 4


@dataclass(frozen=True, kw_only=True)
class DynamicsView:
    """Content of the page."""

    excerpt: Excerpt
    checkpoints: Sequence[Checkpoint]
    loss_CN: npt.NDArray[np.float32]
    """Losses of the valid tokens in nats, in (span, position) order."""
    dynamics: Dynamics

    @property
    def location_N2(self) -> npt.NDArray[np.int64]:
        """Span and position of every valid token, int64 [N, 2]."""
        return np.argwhere(self.excerpt.valid_Ws)


def write_dynamics(view: DynamicsView, output: Path, *, documents: int, most: int) -> Path:
    """Write the page, and its charts beside it as PNG.

    Args:
        documents: number of spans of text shown.
        most: number of most fluctuating tokens listed.
    """
    charts = [_class_means(view), *_examples(view), _fluctuations(view)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output.with_suffix(".png"), png(charts, columns=3))
    dynamics, checkpoints = view.dynamics, view.checkpoints
    parts = [
        page.paragraph(
            f"Losses of {dynamics.class_N.size:,} tokens at {len(checkpoints)} checkpoints, {checkpoints[0].label} to "
            f"{checkpoints[-1].label}. A line is fitted to each token's losses. If the line falls by more than "
            f"{dynamics.threshold_nats:g} nats, the token is H→L; if it rises by more, L→H. The other tokens are L→L "
            "if their last loss is at most the mean of all tokens, and H→H if it is above."
        ),
        _shares(dynamics),
        page.heading("Curves"),
        page.pictures((chart.describe(), svg(chart)) for chart in charts),
        page.heading("Text by class"),
        page.legend([*((_KINDS[c], _MEANINGS[c]) for c in range(len(CLASSES))), NOT_PREDICTED]),
        page.paragraph("Hover over a token, or tap it, to see its first and last loss.", kind="soft"),
        _text(view, documents),
        page.heading("Most fluctuating tokens"),
        page.paragraph("Standard deviation of a token's losses around its fitted line, in nats.", kind="soft"),
        _most_fluctuating(view, most),
    ]
    return page.write_page(output, "Token dynamics", parts, STYLE)


def _shares(dynamics: Dynamics) -> Markup:
    rows = []
    for number, (name, share) in enumerate(dynamics.shares.items()):
        first, last = dynamics.class_mean_4C[number, [0, -1]]
        losses = ["–" if np.isnan(value) else f"{value:.3f}" for value in (first, last)]
        key = Markup('<span class="key {}">{}</span>').format(_KINDS[number], name.replace("->", "→"))
        rows.append([key, page.share_bar(share), *losses])
    rows.append(["all", "", f"{dynamics.mean_C[0]:.3f}", f"{dynamics.mean_C[-1]:.3f}"])
    return page.table(["class", "share of tokens", "mean loss, first", "mean loss, last"], rows)


def _axis(checkpoints: Sequence[Checkpoint]) -> tuple[str, list[float]]:
    steps = [checkpoint.step for checkpoint in checkpoints]
    if None in steps:
        return "checkpoint", [float(i + 1) for i in range(len(checkpoints))]
    return "step", [float(step or 0) for step in steps]


def _class_means(view: DynamicsView) -> Panel:
    label, x = _axis(view.checkpoints)
    curves = [
        Curve(name=CLASSES[c], x=x, y=row.tolist(), color=_COLORS[c], style=_STYLES[c], marker=_MARKERS[c])
        for c, row in enumerate(view.dynamics.class_mean_4C)
        if not np.isnan(row).any()
    ]
    return Panel(title="Mean loss of each class", x_label=label, y_label="nats per token", curves=curves)


def _examples(view: DynamicsView) -> Iterator[Panel]:
    """Yield for each class the losses of a few tokens whose fluctuation is neither the smallest nor the largest."""
    label, x = _axis(view.checkpoints)
    location_N2 = view.location_N2
    for c in range(len(CLASSES)):
        own = np.flatnonzero(view.dynamics.class_N == c)
        if not own.size:
            continue
        order = own[np.argsort(view.dynamics.fluctuation_N[own], kind="stable")]
        levels = np.linspace(0.4, 0.9, EXAMPLES_PER_CLASS)
        chosen = dict.fromkeys(int(order[int(level * (order.size - 1))]) for level in levels)
        curves = []
        for i, n in enumerate(chosen):
            row, position = location_N2[n]
            text = view.excerpt.token_texts(int(row))[position + 1]
            style = ("-", "--", ":", "-.")[i % 4]
            curves.append(
                Curve(name=repr(text)[:14], x=x, y=view.loss_CN[:, n].tolist(), color=_COLORS[c], style=style)
            )
        yield Panel(title=f"Examples of {CLASSES[c]}", x_label=label, y_label="nats", curves=curves)


def _fluctuations(view: DynamicsView) -> Panel:
    fluctuation_N = view.dynamics.fluctuation_N
    limit = float(np.quantile(fluctuation_N, 0.995)) or 1.0
    counts, edges = np.histogram(fluctuation_N, bins=40, range=(0.0, limit))
    histogram = Histogram(name="tokens", edges=edges.tolist(), counts=counts.tolist(), color=_COLORS[FALLING])
    return Panel(
        title="Fluctuation around the line",
        x_label="standard deviation, nats",
        y_label="tokens",
        histograms=[histogram],
    )


def _text(view: DynamicsView, count: int) -> Markup:
    valid_Ws, dynamics = view.excerpt.valid_Ws, view.dynamics
    number_Ws = np.zeros(valid_Ws.shape, np.int64)
    number_Ws[valid_Ws] = np.arange(dynamics.class_N.size)

    def annotate(row: int, position: int) -> tuple[str, str]:
        n = int(number_Ws[row, position])
        c = int(dynamics.class_N[n])
        first, last = view.loss_CN[[0, -1], n]
        return _KINDS[c], f"{CLASSES[c]}: {first:.2f} to {last:.2f} nats, change {dynamics.change_N[n]:+.2f}"

    return text_cards(view.excerpt, count, annotate)


def most_fluctuating_rows(view: DynamicsView, count: int) -> list[dict[str, Any]]:
    """Return the most fluctuating tokens and their preceding texts as JSON values."""
    rows: list[dict[str, Any]] = []
    location_N2 = view.location_N2
    for n in view.dynamics.most_fluctuating(count):
        row, position = (int(value) for value in location_N2[n])
        texts = view.excerpt.token_texts(row)
        rows.append(
            {
                "token": texts[position + 1],
                "before": "".join(texts[: position + 1])[-40:],
                "class": CLASSES[int(view.dynamics.class_N[n])],
                "fluctuation": float(view.dynamics.fluctuation_N[n]),
                "losses": view.loss_CN[:, n].tolist(),
            }
        )
    return rows


def _most_fluctuating(view: DynamicsView, count: int) -> Markup:
    rows = [
        [
            page.visible(str(row["token"])),
            f"{row['fluctuation']:.3f}",
            row["class"],
            " ".join(f"{loss:.1f}" for loss in row["losses"]),
            page.visible(str(row["before"])),
        ]
        for row in most_fluctuating_rows(view, count)
    ]
    return page.table(["token", "deviation", "class", "losses", "preceding text"], rows)
