"""The page of a selection: kept tokens in colour, what they are, scores, agreement, and how preference changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_slm.analysis import page
from megatron_slm.analysis.charts import COLOURS, Panel, svg
from megatron_slm.analysis.kept import Kept, agreement, groups, levels
from megatron_slm.analysis.losses import Statistics
from megatron_slm.analysis.sample import Sample

# Kept tokens are darker and underlined, so that they are seen without any colour; levels go from blue to orange.
STYLE = """
.k { background:#a9d4f5; color:#06283d; border-bottom:2px solid #0072B2 } .d { color:var(--soft) }
.l0 { background:#0a4f80; color:#fff; border-bottom:2px solid #fff } .l1 { background:#a9d4f5; color:#06283d }
.l3 { background:#fbe3b3; color:#3d2a00 } .l4 { background:#9a4a00; color:#fff; border-bottom:2px dotted #fff }
.stages { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr)); gap:.9rem }
"""
_MASKED = "not predicted: the loss mask leaves it out"
_LEVELS = ("highest fifth of scores", "second", "middle", "fourth", "lowest fifth")


@dataclass(frozen=True, kw_only=True)
class SelectionView:
    """Everything that the page shows. `kept[-1]` is the selection that is coloured."""

    sample: Sample
    model: Statistics
    """What the last model says."""
    reference: Statistics | None
    kept: Sequence[Kept]
    """By every model, oldest first, with the first reference."""
    by_reference: Sequence[Kept]
    """By the last model, with each further reference."""
    score: str
    keep_ratio: float

    @property
    def last(self) -> Kept:
        """The selection that is coloured."""
        return self.kept[-1]


def to_json(view: SelectionView) -> dict[str, Any]:
    """The numbers of the page."""
    valid = view.sample.valid_Ws
    score_N = view.last.score_N(valid)
    return {
        "tokens": int(valid.sum()),
        "kept_tokens": int(view.last.kept_Ws.sum()),
        "keep_ratio": view.keep_ratio,
        "score": view.score,
        "model": view.last.name,
        "score_quantiles": {f"p{q:02}": float(np.quantile(score_N, q / 100)) for q in (5, 25, 50, 75, 95)},
        "groups": [asdict(group) for group in groups(view.sample, view.last, view.model, view.reference)],
        "agreement": [
            {"first": first.name, "second": second.name, "agreement": agreement(first, second)}
            for first, second in _pairs(view)
        ],
    }


def write_selection(view: SelectionView, output: Path, *, documents: int) -> Path:
    """Write the page."""
    sample, last = view.sample, view.last
    num_kept, num_tokens = int(last.kept_Ws.sum()), sample.num_tokens
    parts = [
        page.paragraph(
            f"{last.name}: of {num_tokens:,} tokens the {num_kept:,} ({num_kept / max(1, num_tokens):.1%}) with the "
            f"highest score ({view.score}, in nats) are kept."
        ),
        page.heading("What is kept"),
        _groups(view),
        page.heading("Scores"),
        page.pictures((panel.describe(), svg(panel)) for panel in _histograms(view)),
        *_agreement(view),
        page.heading("The text"),
        page.legend([("k", "kept"), ("d", "not kept"), ("u", "not predicted")]),
        page.paragraph("Point at a token, or touch it, for its losses and score. ↵ is a line end.", kind="soft"),
        Markup('<div class="docs">{}</div>').format(page.join(_documents(view, documents))),
        *_preference(view),
    ]
    return page.write_page(output, "Which tokens are kept", parts, STYLE)


def _groups(view: SelectionView) -> Markup:
    tables = []
    rows = groups(view.sample, view.last, view.model, view.reference)
    for grouping, own in groupby(rows, key=lambda group: group.grouping):
        cells = [
            [
                group.name,
                f"{group.tokens:,}",
                page.share_bar(group.kept_share),
                f"{group.mean_loss:.3f}",
                "–" if group.mean_reference_loss is None else f"{group.mean_reference_loss:.3f}",
                f"{group.mean_score:+.3f}",
            ]
            for group in own
        ]
        heads = [grouping, "tokens", "kept", "mean loss", "mean reference loss", "mean score"]
        tables.append(page.table(heads, cells))
    return page.join(tables)


def _histograms(view: SelectionView) -> Iterator[Panel]:
    valid = view.sample.valid_Ws
    score_N, kept_N = view.last.score_Ws[valid], view.last.kept_Ws[valid]
    low, high = (float(value) for value in np.quantile(score_N, [0.002, 0.998]))
    named = [("kept", score_N[kept_N], COLOURS[1]), ("not kept", score_N[~kept_N], COLOURS[4])]
    yield _histogram(f"Score: {view.score}", "score, nats", named, (low, high))
    losses = [("model", view.model.loss_Ws[valid], COLOURS[1])]
    if view.reference is not None:
        losses.append(("reference", view.reference.loss_Ws[valid], COLOURS[0]))
    yield _histogram("Token losses", "loss, nats", losses, (0.0, float(np.quantile(losses[0][1], 0.99)) or 1.0))


def _histogram(title: str, label: str, named: Sequence[tuple[str, Any, str]], limits: tuple[float, float]) -> Panel:
    bars = []
    for name, values, colour in named:
        heights, edges = np.histogram(values, bins=40, range=limits if limits[0] < limits[1] else None)
        bars.append((name, edges.tolist(), heights.tolist(), colour))
    return Panel(title=title, x_label=label, y_label="tokens", bars=bars)


def _pairs(view: SelectionView) -> Iterator[tuple[Kept, Kept]]:
    for other in (*view.kept[:-1], *view.by_reference):
        yield view.last, other


def _agreement(view: SelectionView) -> Iterator[Markup]:
    pairs = list(_pairs(view))
    if not pairs:
        return
    yield page.heading("Agreement")
    yield page.paragraph(
        f"The share of the tokens that {view.last.name} keeps and another model or reference keeps too. Chance would "
        f"agree on {view.keep_ratio:.0%}."
    )
    rows = [[second.name, page.share_bar(agreement(first, second))] for first, second in pairs]
    yield page.table(["compared with", "agreement"], rows)


def _documents(view: SelectionView, count: int) -> Iterator[Markup]:
    sample = view.sample
    for window in range(min(count, len(sample.windows))):
        first, *pieces = sample.pieces(window)
        spans = [page.token_span(first, "u", "first token, not predicted")]
        for s, piece in enumerate(pieces):
            if not sample.valid_Ws[window, s]:
                spans.append(page.token_span(piece, "u", _MASKED))
                continue
            kept = bool(view.last.kept_Ws[window, s])
            tip = f"{'kept' if kept else 'not kept'}: loss {view.model.loss_Ws[window, s]:.3f}"
            if view.reference is not None:
                tip += f", reference {view.reference.loss_Ws[window, s]:.3f}"
            tip += f", score {view.last.score_Ws[window, s]:+.3f}"
            spans.append(page.token_span(piece, "k" if kept else "d", tip))
        yield page.document_card(sample.windows[window].source, spans)


def at_quarters(kept: Sequence[Kept]) -> list[tuple[str, Kept]]:
    """The models next to 0, 33, 66 and 100 % of training, whose end is the last of them.

    By their steps, or by their numbers where one does not tell its step.
    """
    steps = [one.step for one in kept]
    places = list(range(len(kept))) if None in steps else [step or 0 for step in steps]
    chosen = []
    for share in (0, 33, 66, 100):
        goal = share * places[-1] / 100
        number = min(range(len(kept)), key=lambda i: abs(places[i] - goal))
        chosen.append((f"{share} %", kept[number]))
    return chosen


def _preference(view: SelectionView) -> Iterator[Markup]:
    """The longest document under the scores of four moments of training (Rho-1's figure 14)."""
    if len(view.kept) < 4:
        return
    sample = view.sample
    window = int(np.argmax(sample.valid_Ws[:50].sum(axis=1)))
    first, *pieces = sample.pieces(window)
    of = "the models given" if any(kept.step is None for kept in view.kept) else "training, by the nearest checkpoint"
    yield page.heading(f"What is preferred at 0, 33, 66 and 100 % of {of}")
    yield page.legend([(f"l{i}", text) for i, text in enumerate(_LEVELS)])
    cards = []
    for share, kept in at_quarters(view.kept):
        level_s = levels(kept, sample.valid_Ws)[window]
        spans = [page.token_span(first, "u", "first token, not predicted")]
        for s, piece in enumerate(pieces):
            if not sample.valid_Ws[window, s]:
                spans.append(page.token_span(piece, "u", _MASKED))
                continue
            level = int(level_s[s])
            tip = f"{_LEVELS[level]}: score {kept.score_Ws[window, s]:+.3f}"
            spans.append(page.token_span(piece, f"l{level}", tip))
        cards.append(page.document_card(f"{share}: {kept.name}", spans))
    yield Markup('<div class="stages">{}</div>').format(page.join(cards))
