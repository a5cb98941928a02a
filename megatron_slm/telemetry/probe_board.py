"""The probe's texts in TensorBoard: as text, as pictures, and their tokens' losses and scores as histograms.

TensorBoard shows Markdown, and of HTML only what carries no style (`tensorboard.plugin_util`): a colour or a `span` of
ours would be taken out. Links are left, with a title, and shown in the colour of links: so kept tokens are links that
lead nowhere and say their losses when pointed at. Colour by loss is in the picture of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megatron_slm.analysis.probe_records import ProbedTexts, ProbeRecord
from megatron_slm.telemetry.text_picture import text_picture

TEXTS_SHOWN, TOKENS_SHOWN = 8, 512
"""As text and as pictures, which every evaluation adds to the event file; histograms and records are of all."""


def show_record(board: SummaryWriter, texts: ProbedTexts, record: ProbeRecord) -> None:
    """Add what was seen at one step."""
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
    """A text whose kept tokens are links; of a run that selects nothing, those above the mean loss of all texts."""
    mean = float(record.loss_Ws[texts.valid_Ws].mean())
    rule = f"in the colour of links: a loss above {mean:.2f} nats, the mean" if record.kept_Ws is None else (
        "in the colour of links: kept"
    )  # fmt: skip
    return f"*{_escaped(texts.sources[number])}, step {record.step}; {rule}; point at a token for its losses*\n\n" + (
        "".join(_tokens(texts, record, number, mean))
    )


def _tokens(texts: ProbedTexts, record: ProbeRecord, number: int, mean: float) -> Iterator[str]:
    first, *pieces = texts.token_texts[number][: TOKENS_SHOWN + 1]
    yield _escaped(first)
    for s, piece in enumerate(pieces):
        loss = float(record.loss_Ws[number, s])
        marked = loss > mean if record.kept_Ws is None else bool(record.kept_Ws[number, s])
        if not marked or not piece:
            yield _escaped(piece)
            continue
        said = [f"loss {loss:.3f}"]
        if texts.reference_loss_Ws is not None:
            said.append(f"reference {texts.reference_loss_Ws[number, s]:.3f}")
        if record.score_Ws is not None:
            said.append(f"score {record.score_Ws[number, s]:+.3f}")
        yield f'[{_escaped(piece)}](# "{", ".join(said)}")'


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is: what is not a letter or a digit becomes a character reference."""
    shown = "".join(c if c.isalnum() or c in " \n" else f"&#{ord(c)};" for c in text)
    return shown.replace("\n", "&#8629;<br>")
