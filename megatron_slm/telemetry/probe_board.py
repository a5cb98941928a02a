"""Shows probed texts in TensorBoard: as text, as pictures, and their losses and scores as histograms.

TensorBoard renders Markdown and strips colors and spans from HTML (`tensorboard.plugin_util`), but keeps links and
their titles. Kept tokens are therefore links to nowhere, with the token's losses as title. The picture of the same name
has colors by loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megatron_slm.analysis.probe_records import ProbedTexts, ProbeRecord
from megatron_slm.telemetry.text_picture import text_picture

TEXTS_SHOWN, TOKENS_SHOWN = 8, 512
"""Limits for text and pictures, which grow the event file at every evaluation; histograms cover all texts."""


def show_record(board: SummaryWriter, texts: ProbedTexts, record: ProbeRecord) -> None:
    """Add the record of one step."""
    valid, step = texts.valid_Ws, record.step
    columns = {"loss": record.loss_Ws[valid]}
    if record.score_Ws is not None and record.kept_Ws is not None:
        kept_N = record.kept_Ws[valid]
        columns["score"] = record.score_Ws[valid]
        columns["loss_kept"], columns["loss_not_kept"] = columns["loss"][kept_N], columns["loss"][~kept_N]
    if texts.reference_loss_Ws is not None:
        columns["excess_loss"] = columns["loss"] - texts.reference_loss_Ws[valid]
    for name, values in columns.items():
        finite = values[np.isfinite(values)]
        if finite.size:
            board.add_histogram(f"probe/{name}", finite, step)
    for number in range(min(TEXTS_SHOWN, len(texts.token_texts))):
        name = f"probe/text {number + 1}"
        board.add_text(name, _markdown(texts, record, number), step)
        kept_s = None if record.kept_Ws is None else record.kept_Ws[number]
        picture = text_picture(texts.token_texts[number][: TOKENS_SHOWN + 1], record.loss_Ws[number], kept_s)
        board.add_image(name, picture, step, dataformats="HWC")


def _markdown(texts: ProbedTexts, record: ProbeRecord, number: int) -> str:
    """Return a text with links for kept tokens, or without a selection for tokens above the mean loss of all texts."""
    mean = float(record.loss_Ws[texts.valid_Ws].mean())
    marked = f"loss above the mean of {mean:.2f} nats" if record.kept_Ws is None else "kept"
    source = _escape(texts.sources[number])
    header = f"*{source}, step {record.step}; in link color: {marked}; hover over a token for its losses*"
    return f"{header}\n\n{''.join(_tokens(texts, record, number, mean))}"


def _tokens(texts: ProbedTexts, record: ProbeRecord, number: int, mean: float) -> Iterator[str]:
    first, *pieces = texts.token_texts[number][: TOKENS_SHOWN + 1]
    yield _escape(first)
    for s, piece in enumerate(pieces):
        loss = float(record.loss_Ws[number, s])
        marked = loss > mean if record.kept_Ws is None else bool(record.kept_Ws[number, s])
        if not marked or not piece:
            yield _escape(piece)
            continue
        title = [f"loss {loss:.3f}"]
        if texts.reference_loss_Ws is not None:
            title.append(f"reference {texts.reference_loss_Ws[number, s]:.3f}")
        if record.score_Ws is not None:
            title.append(f"score {record.score_Ws[number, s]:+.3f}")
        yield f'[{_escape(piece)}](# "{", ".join(title)}")'


def _escape(text: str) -> str:
    """Replace all but letters and digits by character references, so that Markdown renders the text verbatim."""
    shown = "".join(c if c.isalnum() or c in " \n" else f"&#{ord(c)};" for c in text)
    return shown.replace("\n", "&#8629;<br>")
