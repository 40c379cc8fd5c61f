"""Pictures of predictions, by torchvision's make_grid and matplotlib.

All functions take and return uint8 arrays: an image is [H, W, C] with 1 or 3 channels, a picture is [H', W', 3].
matplotlib takes 0.3 s to import, so functions import it.
"""

import functools
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import pad
from torchvision.utils import make_grid

RIGHT = "#08519c"
WRONG = "#be181d"
Line = tuple[str, str]  # a caption's line: text and colour
_FRAME = (206, 212, 218)
_LINE_PX = 18  # height of a caption's line
_CHARACTER_PX = 8
_PADDING_PX = 8  # between tiles
_CODE_POINT = re.compile(r"U\+([0-9A-F]{4,6})")
_LONGEST = 200  # characters of a name, which are checked for fonts


@functools.cache
def _font_of(char: str) -> str | None:
    """Return an upright font that has a character, or None; matplotlib's own fonts come first."""
    from matplotlib.font_manager import fontManager, get_font

    fonts = sorted(fontManager.ttflist, key=lambda font: (font.name != "DejaVu Sans", font.name != "STIXGeneral"))
    for font in fonts:
        if font.style != "normal" or "Last Resort" in font.name:  # draws a box for every character
            continue
        if get_font(font.fname).get_char_index(ord(char)):
            return font.name
    return None


def _style(texts: Iterable[str]) -> AbstractContextManager[None]:
    """Return the matplotlib context with fonts for these texts."""
    from utils.record.plots import style

    fonts = filter(None, map(_font_of, sorted(set("".join(texts)))))
    return style(list(dict.fromkeys(["DejaVu Sans", *fonts])))


def legible(name: str, longest: int = _LONGEST) -> str:
    """Return a class's name for a picture.

    A code point (`U+0041`, as in the glyphs) becomes its character, a combining one on a dotted circle, unless the
    character is blank or no font has it. In other names, characters without a font become their code points.
    """
    named = _CODE_POINT.fullmatch(name)
    if named is not None and int(named[1], 16) <= 0x10FFFF:
        char = chr(int(named[1], 16))
        kind = unicodedata.category(char)[0]
        if kind in "ZC" or _font_of(char) is None:  # separators and controls are blank
            return name
        return f"◌{char}" if kind == "M" else char
    flat = " ".join(name[:longest].split())
    return "".join(char if _font_of(char) is not None else f"U+{ord(char):04X}" for char in flat)


def shorten(text: str, most: int) -> str:
    """Shorten a text to `most` characters by an ellipsis in the middle: names often differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2].rstrip()}…{text[len(text) - (most - 1) // 2 :].lstrip()}"


def wrap(text: str, most_lines: int, width: int = 27) -> list[str]:
    """Return a text as legible lines of `width` characters, of which a wide one counts twice; the last may end in …."""
    text = legible(text, width * most_lines)
    spaced = "".join(f"{char}\0" if unicodedata.east_asian_width(char) in "WF" else char for char in text)
    lines = textwrap.wrap(spaced, width, max_lines=most_lines, placeholder="…")
    return [line.replace("\0", "") for line in lines]


def _to_tile(image: np.ndarray, tile_px: int) -> torch.Tensor:
    """Return [3, tile_px, tile_px]: a framed image, as large as fits, on white.

    Small images grow by whole factors, so that their pixels stay visible.
    """
    picture = Image.fromarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image))
    inside = tile_px - 2
    if (factor := inside // max(picture.size)) >= 2:
        picture = ImageOps.scale(picture, factor, Image.Resampling.NEAREST)
    else:
        picture = ImageOps.contain(picture, (inside, inside), Image.Resampling.LANCZOS)
    framed = ImageOps.expand(picture, 1, _FRAME)  # else a white image has no visible edge
    tile = Image.new("RGB", (tile_px, tile_px), "white")
    tile.paste(framed, ((tile_px - framed.width) // 2, tile_px - framed.height))
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1)


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

    from utils.record.plots import figure_to_image

    texts = [text for lines in captions for text, _ in lines]
    cell = max([tile_px, *(_CHARACTER_PX * len(text) for text in texts)])
    below = _LINE_PX * max(map(len, captions), default=0)
    left = (cell - tile_px) // 2
    room = (left, cell - tile_px - left, 0, below)
    tiles = [pad(_to_tile(image, tile_px), room, value=255) for image in images]
    tiles = tiles or [torch.full((3, 1, cell), 255, dtype=torch.uint8)]
    columns = min(columns, len(tiles))
    grid = make_grid(torch.stack(tiles), columns, _PADDING_PX, pad_value=255).permute(1, 2, 0).numpy()
    with _style(texts):
        figure = Figure(figsize=(grid.shape[1] / 110, grid.shape[0] / 110))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(grid, interpolation="nearest")
        axis.axis("off")
        axis.set_title(title)
        for index, lines in enumerate(captions):
            row, column = divmod(index, columns)
            x = column * (cell + _PADDING_PX) + _PADDING_PX + cell / 2
            y = row * (tile_px + below + _PADDING_PX) + _PADDING_PX + tile_px + _LINE_PX / 2
            for number, (text, color) in enumerate(lines):
                axis.text(x, y + number * _LINE_PX, text, color=color, ha="center", va="center")
        return figure_to_image(figure)


def confusion_matrix(counts: np.ndarray, samples: np.ndarray, names: Sequence[str], title: str) -> np.ndarray:
    """Draw a confusion matrix in per cent of each true class, as scikit-learn does, whose import takes over a second.

    counts: [N, N], row true, column predicted. samples: [N], the images of each class, including predictions of other
    classes than these N.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from utils.record.plots import figure_to_image

    percent = 100 * np.asarray(counts) / np.maximum(samples, 1)[:, None]
    others = 100 * (samples - counts.sum(axis=1)) / np.maximum(samples, 1)
    columns = [shorten(legible(name), 24) for name in names]
    form = "{}  ({:,}, other {:.0f})" if others.any() else "{}  ({:,})"
    rows = list(map(form.format, columns, samples, others))
    cell = 0.46  # inches
    if len(names) <= 12:
        cell = 0.9 if len(names) <= 6 else 0.7
    with _style(rows):
        figure = Figure(figsize=(cell * len(names), cell * len(names)))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(percent, cmap="Blues")
        axis.grid(False)
        axis.xaxis.tick_top()
        axis.xaxis.set_label_position("top")
        axis.tick_params("x", labelrotation=0 if max(map(len, columns)) * 0.1 < cell else 90)
        axis.set(xlabel="predicted", ylabel="true (images)")
        axis.set_xticks(range(len(names)), columns)
        axis.set_yticks(range(len(names)), rows)
        axis.set_title(title, pad=12)
        middle = (percent.max() + percent.min()) / 2
        light, dark = matplotlib.colormaps["Blues"]([0.0, 1.0])
        for row, column in np.argwhere(np.asarray(counts) > 0):
            value = percent[row, column]
            color = light if value >= middle else dark
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, in_layout=False)
        return figure_to_image(figure)
