"""Cards of an excerpt's text for HTML pages, with a class and a tooltip for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from markupsafe import Markup

from megatron_slm.analysis.excerpt import Excerpt
from megatron_slm.pages import page

NOT_PREDICTED = ("u", "not predicted")
"""CSS class of tokens without a loss, and its meaning in a legend."""
Annotate = Callable[[int, int], tuple[str, str]]
"""Returns the CSS class and the tooltip of a predicted token, by its row and position."""


def text_card(excerpt: Excerpt, row: int, annotate: Annotate, *, title: str) -> Markup:
    """Return one span of an excerpt, token by token."""
    return page.document_card(title, _tokens(excerpt, row, annotate))


def text_cards(excerpt: Excerpt, count: int, annotate: Annotate) -> Markup:
    """Return the first `count` spans of an excerpt, each titled with its source."""
    rows = range(min(count, len(excerpt.spans)))
    cards = (text_card(excerpt, row, annotate, title=excerpt.spans[row].source) for row in rows)
    return Markup('<div class="docs">{}</div>').format(page.join(cards))


def _tokens(excerpt: Excerpt, row: int, annotate: Annotate) -> Iterator[Markup]:
    first, *texts = excerpt.token_texts(row)
    kind, _ = NOT_PREDICTED
    yield page.token(first, kind, "not predicted: first token")
    for position, text in enumerate(texts):
        if excerpt.valid_Ws[row, position]:
            yield page.token(text, *annotate(row, position))
        else:
            yield page.token(text, kind, "not predicted: excluded by the loss mask")
