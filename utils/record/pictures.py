"""Pictures of predictions, by Pillow and matplotlib.

All functions take and return uint8 arrays: an image is [H, W, C] with 1 or 3 channels, a picture is [H', W', 3].
matplotlib takes 0.3 s to import, so functions import it.
"""

import math
import re
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

RIGHT = "#08519c"
WRONG = "#be181d"
Line = tuple[str, str]  # a caption's line: text and colour
_FRAME = (206, 212, 218)
_LINE_PX = 18  # height of a caption's line
_CHARACTER_PX = 8
_LINE_CHARACTERS = 27  # of a wrapped text
_PADDING_PX = 8  # between tiles
_CODE_POINT = re.compile(r"U\+(10[0-9A-F]{4}|[0-9A-F]{4,5})")


def legible(name: str) -> str:
    """Return a class's name for a picture, on one line.

    A code point (`U+0041`, as in the glyphs) becomes its character, a combining one on a dotted circle, unless the
    character is blank.
    """
    named = _CODE_POINT.fullmatch(name)
    char = chr(int(named[1], 16)) if named else " "
    kind = unicodedata.category(char)[0]
    if kind in "ZC":  # separators and controls
        return " ".join(name.split())
    return f"◌{char}" if kind == "M" else char


def shorten(text: str, most: int) -> str:
    """Shorten a text to `most` characters by an ellipsis in the middle: names often differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2].rstrip()}…{text[len(text) - (most - 1) // 2 :].lstrip()}"


def wrap(text: str, most_lines: int) -> list[str]:
    """Return a text as legible lines; the last may end in …."""
    return textwrap.wrap(legible(text), _LINE_CHARACTERS, max_lines=most_lines, placeholder="…")


def _to_tile(image: np.ndarray, tile_px: int) -> Image.Image:
    """Return a framed image, as large as fits. Small ones grow by whole factors, so that their pixels stay visible."""
    picture = Image.fromarray(np.ascontiguousarray(image.squeeze(2) if image.shape[2] == 1 else image))
    inside = tile_px - 2
    if (factor := inside // max(picture.size)) >= 2:
        picture = ImageOps.scale(picture, factor, Image.Resampling.NEAREST)
    else:
        picture = ImageOps.contain(picture, (inside, inside), Image.Resampling.LANCZOS)
    return ImageOps.expand(picture.convert("RGB"), 1, _FRAME)  # else a white image has no visible edge


def image_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[Sequence[Line]],
    title: str,
    *,
    columns: int = 8,
    tile_px: int = 114,
) -> np.ndarray:
    """Draw a title and rows of images, each above the lines of its caption."""
    from matplotlib.figure import Figure

    from utils.record.plots import figure_to_image, style

    texts = [text for lines in captions for text, _ in lines]
    columns = max(1, min(columns, len(images)))
    width = _PADDING_PX + max([tile_px, *(_CHARACTER_PX * len(text) for text in texts)])
    height = _PADDING_PX + tile_px + _LINE_PX * max(map(len, captions), default=0)
    grid = Image.new("RGB", (width * columns, height * math.ceil(len(images) / columns) + 1), "white")
    with style():
        figure = Figure(figsize=(grid.width / 110, grid.height / 110))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.axis("off")
        axis.set_title(title)
        for index, (image, lines) in enumerate(zip(images, captions)):
            row, column = divmod(index, columns)
            middle = column * width + width // 2
            bottom = row * height + _PADDING_PX + tile_px
            tile = _to_tile(image, tile_px)
            grid.paste(tile, (middle - tile.width // 2, bottom - tile.height))
            for number, (text, color) in enumerate(lines):
                axis.text(middle, bottom + (number + 0.5) * _LINE_PX, text, color=color, ha="center", va="center")
        axis.imshow(grid, interpolation="nearest")
        return figure_to_image(figure)
