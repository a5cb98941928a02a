"""Renders a text as a picture with a color per token, for viewers of pictures such as TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

LOSS_EDGES = (0.5, 1.0, 2.0, 4.0)
"""Losses, in nats, at which the color changes."""
# One hue from light to dark, distinguishable by color-blind readers and in grayscale.
_FILLS = ("#ffffff", "#d6eaf8", "#a3cdee", "#4f97cf", "#0b4f82")
_INKS = ("#374151", "#06283d", "#06283d", "#ffffff", "#ffffff")
_MARK, _SOFT = "#D55E00", "#5b6470"
_COLUMNS, _SIZE, _MARGIN = 76, 15, 14


def text_picture(
    pieces: Sequence[str], loss_s: npt.NDArray[np.float32], kept_s: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.uint8]:
    """Return a picture of the text, uint8 [height, width, 3]: tokens colored by loss, kept tokens underlined.

    Args:
        pieces: text of each token, including the first, which has no loss.
        loss_s: losses of the other tokens, in nats.
        kept_s: True for kept tokens; None without a selection.
    """
    font = ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"), _SIZE)
    width, height = round(font.getlength("x")), round(_SIZE * 1.75)
    num_predicted = len(pieces) - 1
    levels = [0, *np.searchsorted(np.array(LOSS_EDGES), loss_s[:num_predicted]).tolist()]
    marked = [False] * len(pieces) if kept_s is None else [False, *kept_s[:num_predicted].tolist()]
    cells = list(_cells(pieces))
    rows = max((row for row, *_ in cells), default=0) + 1
    size = (_COLUMNS * width + 2 * _MARGIN, (rows + 2) * height + 2 * _MARGIN)
    image = Image.new("RGB", size, "#ffffff")
    draw = ImageDraw.Draw(image)
    _legend(draw, font, width, height, with_kept=kept_s is not None)
    for row, column, text, token in cells:
        x, y = _MARGIN + column * width, _MARGIN + (row + 2) * height
        draw.rectangle((x, y, x + len(text) * width - 1, y + height - 4), fill=_FILLS[levels[token]])
        draw.text((x, y + 2), text, font=font, fill=_SOFT if token == 0 else _INKS[levels[token]])
        if marked[token]:
            draw.rectangle((x, y + height - 5, x + len(text) * width - 2, y + height - 3), fill=_MARK)
    return np.asarray(image)


def _legend(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int, height: int, *, with_kept: bool
) -> None:
    edges = (0.0, *LOSS_EDGES)
    names = [f" {low:g}-{high:g} " for low, high in pairwise(edges)] + [f" over {edges[-1]:g} nats "]
    x = _MARGIN
    for name, fill, ink in zip(names, _FILLS, _INKS, strict=True):
        draw.rectangle((x, _MARGIN, x + len(name) * width - 1, _MARGIN + height - 4), fill=fill, outline=_SOFT)
        draw.text((x, _MARGIN + 2), name, font=font, fill=ink)
        x += (len(name) + 1) * width
    if with_kept:
        draw.text((x + width, _MARGIN + 2), "kept", font=font, fill=_INKS[0])
        draw.rectangle((x + width, _MARGIN + height - 5, x + 5 * width, _MARGIN + height - 3), fill=_MARK)


def _cells(pieces: Sequence[str]) -> Iterator[tuple[int, int, str, int]]:
    """Yield row, column, text and token of each cell to draw; tokens break at newlines and at the right edge."""
    row = column = 0
    for token, piece in enumerate(pieces):
        shown = piece.replace("\r", "").replace("\t", "    ").replace("\n", "↵\n")
        for i, line in enumerate(shown.split("\n")):
            if i:
                row, column = row + 1, 0
            while line:
                part, line = line[: _COLUMNS - column], line[_COLUMNS - column :]
                yield row, column, part, token
                column += len(part)
                if column >= _COLUMNS:
                    row, column = row + 1, 0
