"""The page of token dynamics: shares, curves, the text by class, and the tokens that fluctuate most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from megatron_slm.analysis import page
from megatron_slm.analysis.charts import Line, Panel, png, svg
from megatron_slm.analysis.dynamics import CLASSES, FALLING, HIGH, LOW, RISING, Dynamics
from megatron_slm.analysis.losses import Stage
from megatron_slm.analysis.sample import Sample
from megatron_slm.files import write_durably

_COLOURS = {HIGH: "#E69F00", RISING: "#D55E00", FALLING: "#0072B2", LOW: "#555555"}
_STYLES = {HIGH: "--", RISING: ":", FALLING: "-", LOW: "-."}
_KINDS = {HIGH: "hh", RISING: "lh", FALLING: "hl", LOW: "ll"}
_MEANINGS = {
    HIGH: "H→H: stays high",
    RISING: "L→H: rises",
    FALLING: "H→L: is learnt",
    LOW: "L→L: known already",
}
# Told apart by hue, by lightness and by the line below: one of them is always enough.
STYLE = """
.ll { color:var(--soft) } .hl { background:#a9d4f5; color:#06283d; border-bottom:2px solid #0072B2 }
.hh { background:#fbe3b3; color:#3d2a00; border-bottom:2px dashed #8a5f00 }
.lh { background:#7a2e00; color:#fff; border-bottom:2px dotted #fff }
"""
EXAMPLES_PER_CLASS = 4


@dataclass(frozen=True, kw_only=True)
class Looked:
    """Everything that the page shows."""

    sample: Sample
    stages: Sequence[Stage]
    loss_CN: npt.NDArray[np.float32]
    """Of the valid tokens, in (window, position) order."""
    dynamics: Dynamics

    @property
    def place_N2(self) -> npt.NDArray[np.int64]:
        """Window and position of every token, [N, 2]."""
        return np.argwhere(self.sample.valid_Ws)


def write_dynamics(looked: Looked, output: Path, *, documents: int, most: int) -> Path:
    """Write the page, and its curves beside it as PNG."""
    charts = [_class_means(looked), *_examples(looked), _fluctuations(looked)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output.with_suffix(".png"), png(charts, columns=3))
    dynamics, stages = looked.dynamics, looked.stages
    parts = [
        page.paragraph(
            f"Losses of {dynamics.class_N.size:,} held-out tokens at {len(stages)} checkpoints, {stages[0].label} to "
            f"{stages[-1].label}. A line is fitted to each token's losses; a token is H→L where it falls by more than "
            f"{dynamics.threshold_nats:g} nats, L→H where it rises by more, else L→L or H→H by its last loss against "
            "the mean of all."
        ),
        _shares(dynamics),
        page.heading("Curves"),
        page.pictures((chart.describe(), svg(chart)) for chart in charts),
        page.heading("The text by class"),
        page.legend([*((_KINDS[c], _MEANINGS[c]) for c in range(len(CLASSES))), ("u", "not predicted")]),
        page.paragraph("Point at a token, or touch it, for its first and last loss.", kind="soft"),
        Markup('<div class="docs">{}</div>').format(page.join(_documents(looked, documents))),
        page.heading("The tokens that fluctuate most"),
        page.paragraph("Standard deviation of a token's losses around its line, in nats.", kind="soft"),
        _most_fluctuating(looked, most),
    ]
    return page.write_page(output, "Token dynamics", parts, STYLE)


def _shares(dynamics: Dynamics) -> Markup:
    rows = []
    for number, (name, share) in enumerate(dynamics.shares.items()):
        first, last = dynamics.class_mean_4C[number, [0, -1]]
        losses = ["–" if np.isnan(value) else f"{value:.3f}" for value in (first, last)]
        sample = Markup('<span class="key {}">{}</span>').format(_KINDS[number], name.replace("->", "→"))
        rows.append([sample, page.share_bar(share), *losses])
    rows.append(["all", "", f"{dynamics.mean_C[0]:.3f}", f"{dynamics.mean_C[-1]:.3f}"])
    return page.table(["class", "share of tokens", "mean loss, first", "mean loss, last"], rows)


def _axis(stages: Sequence[Stage]) -> tuple[str, list[float]]:
    steps = [stage.step for stage in stages]
    if None in steps:
        return "checkpoint", [float(i + 1) for i in range(len(stages))]
    return "step", [float(step or 0) for step in steps]


def _class_means(looked: Looked) -> Panel:
    label, x = _axis(looked.stages)
    lines = [
        Line(name=CLASSES[c], x=x, y=row.tolist(), colour=_COLOURS[c], style=_STYLES[c], marker="osD^"[c])
        for c, row in enumerate(looked.dynamics.class_mean_4C)
        if not np.isnan(row).any()
    ]
    return Panel(title="Mean loss of each class", x_label=label, y_label="nats per token", lines=lines)


def _examples(looked: Looked) -> Iterator[Panel]:
    """For each class the losses of tokens in the middle of its fluctuation: neither the tidiest nor the wildest."""
    label, x = _axis(looked.stages)
    place_N2 = looked.place_N2
    for c in range(len(CLASSES)):
        own = np.flatnonzero(looked.dynamics.class_N == c)
        if not own.size:
            continue
        order = own[np.argsort(looked.dynamics.fluctuation_N[own], kind="stable")]
        levels = np.linspace(0.4, 0.9, EXAMPLES_PER_CLASS)
        chosen = dict.fromkeys(int(order[int(level * (order.size - 1))]) for level in levels)
        lines = []
        for i, n in enumerate(chosen):
            window, position = place_N2[n]
            text = looked.sample.pieces(int(window))[position + 1]
            style = ("-", "--", ":", "-.")[i % 4]
            lines.append(
                Line(name=repr(text)[:14], x=x, y=looked.loss_CN[:, n].tolist(), colour=_COLOURS[c], style=style)
            )
        yield Panel(title=f"Examples of {CLASSES[c]}", x_label=label, y_label="nats", lines=lines)


def _fluctuations(looked: Looked) -> Panel:
    fluctuation_N = looked.dynamics.fluctuation_N
    heights, edges = np.histogram(fluctuation_N, bins=40, range=(0.0, float(np.quantile(fluctuation_N, 0.995)) or 1.0))
    bars = [("tokens", edges.tolist(), heights.tolist(), _COLOURS[FALLING])]
    return Panel(title="Fluctuation around the line", x_label="standard deviation, nats", y_label="tokens", bars=bars)


def _documents(looked: Looked, count: int) -> Iterator[Markup]:
    start_W = np.concatenate([[0], np.cumsum(looked.sample.valid_Ws.sum(axis=1))])
    for window in range(min(count, len(looked.sample.windows))):
        first, *pieces = looked.sample.pieces(window)
        spans = [page.token_span(first, "u", "first token, not predicted")]
        number = count_from(int(start_W[window]))
        for is_predicted, piece in zip(looked.sample.valid_Ws[window], pieces, strict=False):
            if not is_predicted:
                spans.append(page.token_span(piece, "u", "not predicted: the loss mask leaves it out"))
                continue
            n = next(number)
            c = int(looked.dynamics.class_N[n])
            losses = looked.loss_CN[:, n]
            tip = f"{CLASSES[c]}: {losses[0]:.2f} to {losses[-1]:.2f} nats, change {looked.dynamics.change_N[n]:+.2f}"
            spans.append(page.token_span(piece, _KINDS[c], tip))
        yield page.document_card(looked.sample.windows[window].source, spans)


def most_fluctuating_rows(looked: Looked, count: int) -> list[dict[str, Any]]:
    """The tokens that fluctuate most, with the text before them."""
    rows: list[dict[str, Any]] = []
    place_N2 = looked.place_N2
    for n in looked.dynamics.most_fluctuating(count):
        window, position = (int(value) for value in place_N2[n])
        pieces = looked.sample.pieces(window)
        rows.append(
            {
                "token": pieces[position + 1],
                "before": "".join(pieces[: position + 1])[-40:],
                "class": CLASSES[int(looked.dynamics.class_N[n])],
                "fluctuation": float(looked.dynamics.fluctuation_N[n]),
                "losses": looked.loss_CN[:, n].tolist(),
            }
        )
    return rows


def _most_fluctuating(looked: Looked, count: int) -> Markup:
    rows = [
        [
            page.visible(str(row["token"])),
            f"{row['fluctuation']:.3f}",
            row["class"],
            " ".join(f"{loss:.1f}" for loss in row["losses"]),
            page.visible(str(row["before"])),
        ]
        for row in most_fluctuating_rows(looked, count)
    ]
    return page.table(["token", "deviation", "class", "losses", "after"], rows)
