"""HTML page of a selection: kept tokens, statistics by group, scores, agreement, and the preference over training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_slm.analysis.annotated_text import NOT_PREDICTED, text_card, text_cards
from megatron_slm.analysis.excerpt import Excerpt
from megatron_slm.analysis.kept import KeptTokens, agreement, groups, levels
from megatron_slm.analysis.losses import Floats, ModelStatistics
from megatron_slm.pages import page
from megatron_slm.pages.charts import COLORS, Histogram, Panel, svg

# Kept tokens are darker and underlined, recognizable without color; levels range from blue to orange.
STYLE = """
.k { background:#a9d4f5; color:#06283d; border-bottom:2px solid #0072B2 } .d { color:var(--soft) }
.l0 { background:#0a4f80; color:#fff; border-bottom:2px solid #fff } .l1 { background:#a9d4f5; color:#06283d }
.l3 { background:#fbe3b3; color:#3d2a00 } .l4 { background:#9a4a00; color:#fff; border-bottom:2px dotted #fff }
.stages { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr)); gap:.9rem }
"""
_LEVELS = ("highest fifth of scores", "second fifth", "middle fifth", "fourth fifth", "lowest fifth")


@dataclass(frozen=True, kw_only=True)
class SelectionView:
    """Content of the page."""

    excerpt: Excerpt
    model: ModelStatistics
    """Statistics of the last model."""
    reference: ModelStatistics | None
    kept: Sequence[KeptTokens]
    """Selections of every model, oldest first, with the first reference; the last one is highlighted in the text."""
    by_reference: Sequence[KeptTokens]
    """Selections of the last model with each further reference."""
    score: str
    keep_ratio: float

    @property
    def last(self) -> KeptTokens:
        """Selection highlighted in the text."""
        return self.kept[-1]


def to_json(view: SelectionView) -> dict[str, Any]:
    """Return the numbers of the page as JSON values."""
    valid = view.excerpt.valid_Ws
    score_N = view.last.score_N(valid)
    return {
        "tokens": int(valid.sum()),
        "kept_tokens": int(view.last.kept_Ws.sum()),
        "keep_ratio": view.keep_ratio,
        "score": view.score,
        "model": view.last.name,
        "score_quantiles": {f"p{q:02}": float(np.quantile(score_N, q / 100)) for q in (5, 25, 50, 75, 95)},
        "groups": [asdict(group) for group in groups(view.excerpt, view.last, view.model, view.reference)],
        "agreement": [
            {"first": view.last.name, "second": other.name, "agreement": agreement(view.last, other)}
            for other in _others(view)
        ],
    }


def write_selection(view: SelectionView, output: Path, *, documents: int) -> Path:
    """Write the page.

    Args:
        documents: number of spans of text shown.
    """
    last, num_tokens = view.last, view.excerpt.num_tokens
    num_kept = int(last.kept_Ws.sum())
    parts = [
        page.paragraph(
            f"{last.name} keeps {num_kept:,} of {num_tokens:,} tokens ({num_kept / max(1, num_tokens):.1%}): those "
            f"with the highest score ({view.score}, in nats)."
        ),
        page.heading("Kept tokens by group"),
        _groups(view),
        page.heading("Scores"),
        page.pictures((panel.describe(), svg(panel)) for panel in _histograms(view)),
        *_agreement(view),
        page.heading("Text"),
        page.legend([("k", "kept"), ("d", "not kept"), NOT_PREDICTED]),
        page.paragraph(
            "Hover over a token, or tap it, to see its losses and score. ↵ marks a line break.", kind="soft"
        ),
        _text(view, documents),
        *_preference(view),
    ]
    return page.write_page(output, "Kept tokens", parts, STYLE)


def _groups(view: SelectionView) -> Markup:
    tables = []
    rows = groups(view.excerpt, view.last, view.model, view.reference)
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
    valid = view.excerpt.valid_Ws
    score_N, kept_N = view.last.score_Ws[valid], view.last.kept_Ws[valid]
    low, high = (float(value) for value in np.quantile(score_N, [0.002, 0.998]))
    limits = (low, high) if low < high else None
    yield Panel(
        title=f"Score: {view.score}",
        x_label="score, nats",
        y_label="tokens",
        histograms=[
            _histogram("kept", score_N[kept_N], COLORS[1], limits),
            _histogram("not kept", score_N[~kept_N], COLORS[4], limits),
        ],
    )
    loss_N = view.model.loss_Ws[valid]
    limits = (0.0, float(np.quantile(loss_N, 0.99)) or 1.0)
    histograms = [_histogram("model", loss_N, COLORS[1], limits)]
    if view.reference is not None:
        histograms.append(_histogram("reference", view.reference.loss_Ws[valid], COLORS[0], limits))
    yield Panel(title="Token losses", x_label="loss, nats", y_label="tokens", histograms=histograms)


def _histogram(name: str, values: Floats, color: str, limits: tuple[float, float] | None) -> Histogram:
    counts, edges = np.histogram(values, bins=40, range=limits)
    return Histogram(name=name, edges=edges.tolist(), counts=counts.tolist(), color=color)


def _others(view: SelectionView) -> list[KeptTokens]:
    """Return the selections to compare with the highlighted one."""
    return [*view.kept[:-1], *view.by_reference]


def _agreement(view: SelectionView) -> Iterator[Markup]:
    others = _others(view)
    if not others:
        return
    yield page.heading("Agreement")
    yield page.paragraph(
        f"Share of the tokens kept by {view.last.name} that another model or reference keeps too. Random selections "
        f"would agree on {view.keep_ratio:.0%}."
    )
    rows = [[other.name, page.share_bar(agreement(view.last, other))] for other in others]
    yield page.table(["compared with", "agreement"], rows)


def _text(view: SelectionView, count: int) -> Markup:
    def annotate(row: int, position: int) -> tuple[str, str]:
        kept = bool(view.last.kept_Ws[row, position])
        tip = f"{'kept' if kept else 'not kept'}: loss {view.model.loss_Ws[row, position]:.3f}"
        if view.reference is not None:
            tip += f", reference {view.reference.loss_Ws[row, position]:.3f}"
        tip += f", score {view.last.score_Ws[row, position]:+.3f}"
        return "k" if kept else "d", tip

    return text_cards(view.excerpt, count, annotate)


def at_quarters(kept: Sequence[KeptTokens]) -> list[tuple[str, KeptTokens]]:
    """Return the selections nearest to 0, 33, 66 and 100 % of training, which ends with the last of them.

    Measured by step, or by number if any step is unknown.
    """
    steps = [one.step for one in kept]
    positions = list(range(len(kept))) if None in steps else [step or 0 for step in steps]
    chosen = []
    for share in (0, 33, 66, 100):
        goal = share * positions[-1] / 100
        number = min(range(len(kept)), key=lambda i: abs(positions[i] - goal))
        chosen.append((f"{share} %", kept[number]))
    return chosen


def _preference(view: SelectionView) -> Iterator[Markup]:
    """Yield the longest span under the scores at four moments of training (Rho-1's figure 14)."""
    if len(view.kept) < 4:
        return
    row = int(np.argmax(view.excerpt.valid_Ws[:50].sum(axis=1)))
    has_steps = all(kept.step is not None for kept in view.kept)
    progress = "training (nearest checkpoints)" if has_steps else "the models listed"
    yield page.heading(f"Preferred tokens at 0, 33, 66 and 100 % of {progress}")
    yield page.legend([(f"l{i}", text) for i, text in enumerate(_LEVELS)])
    cards = [
        _preference_card(view.excerpt, row, kept, f"{share}: {kept.name}") for share, kept in at_quarters(view.kept)
    ]
    yield Markup('<div class="stages">{}</div>').format(page.join(cards))


def _preference_card(excerpt: Excerpt, row: int, kept: KeptTokens, title: str) -> Markup:
    level_Ws = levels(kept, excerpt.valid_Ws)

    def annotate(row: int, position: int) -> tuple[str, str]:
        level = int(level_Ws[row, position])
        return f"l{level}", f"{_LEVELS[level]}: score {kept.score_Ws[row, position]:+.3f}"

    return text_card(excerpt, row, annotate, title=title)
