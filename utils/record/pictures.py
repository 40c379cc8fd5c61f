"""Pictures of predictions, set by matplotlib without a display.

All take and return uint8 arrays: an image is [H, W, C] with 1 or 3 channels, a picture [H', W', 3]. matplotlib is
imported where it is used: it takes 0.3 s.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.utils import make_grid

_INK, _QUIET, _RIGHT, _WRONG = "#212529", "#6c757d", "#08519c", "#be181d"
_FRAME = (206, 212, 218)
_MARGIN, _TITLE_PX, _CAPTION_PX, _DPI = 24, 22, 15, 100
_WIDTH_OF_CHAR = 0.62  # of its size: the mean of wide titles
_ROW_TILE_PX, _GRID_TILE_PX, _GRID_COLUMNS = 96, 112, 8
_CODE_POINT = re.compile(r"U\+([0-9A-F]{4,6})")
_LONGEST = 200  # characters of a name that are looked at


@functools.cache
def _fonts() -> list[Any]:
    """Return the upright fonts of matplotlib and the machine; those that matplotlib ships come first."""
    from matplotlib.font_manager import fontManager

    shipped = ("DejaVu Sans", "STIXGeneral")
    # "Last Resort" has a box for every character.
    plain = [font for font in fontManager.ttflist if font.style == "normal" and "Last Resort" not in font.name]
    return sorted(plain, key=lambda font: shipped.index(font.name) if font.name in shipped else len(shipped))


@functools.cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(file).get_charmap())


@functools.lru_cache(maxsize=65536)
def _font_of(char: str) -> str | None:
    """Return the first font that has a character, None for none."""
    return next((font.name for font in _fonts() if ord(char) in _characters(font.fname)), None)


def legible(name: str) -> str:
    """Return how a class is called in a picture.

    A class named by a code point (`U+0041`, as the glyphs are) is its character, a combining one on a dotted circle; it
    keeps its name where the character is blank or no font has it. In other names, a character that no font has becomes
    its code point.
    """
    named = _CODE_POINT.fullmatch(name)
    if named is not None and int(named[1], 16) <= 0x10FFFF:
        char = chr(int(named[1], 16))
        kind = unicodedata.category(char)[0]
        if kind in "ZC" or _font_of(char) is None:  # separators and controls are blank
            return name
        return f"◌{char}" if kind == "M" else char
    flat = " ".join(name[:_LONGEST].split())
    return "".join(char if _font_of(char) is not None else f"U+{ord(char):04X}" for char in flat)


def shorten(text: str, most: int) -> str:
    """Return a text of at most `most` characters, with an ellipsis in its middle: names often differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2].rstrip()}…{text[len(text) - (most - 1) // 2 :].lstrip()}"


def _font(text: str, px: float, color: str = _INK) -> dict[str, object]:
    """Return matplotlib's properties of a text at a size in pixels."""
    families = list(dict.fromkeys(["DejaVu Sans", *(family for char in text if (family := _font_of(char)))]))
    return {"fontsize": 72 * px / _DPI, "color": color, "family": families, "parse_math": False}


def _to_tile(image: np.ndarray, tile_px: int) -> Image.Image:
    """Return an image at about `tile_px` pixels; small ones by whole factors, so that their pixels stay visible."""
    picture = Image.fromarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image))
    factor = tile_px // max(picture.size)
    if factor >= 2:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = [max(1, math.floor(side * tile_px / max(picture.size))) for side in picture.size]
    return picture.resize(tuple(size), Image.Resampling.LANCZOS)


def _draw_page(page: Image.Image, texts: Sequence[tuple[int, int, str, int, str, str]]) -> np.ndarray:
    """Draw texts over a page: (left or right end or centre, middle, text, size in pixels, colour, alignment)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = page.size
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    figure.figimage(np.asarray(page))
    for x, y, text, px, color, align in texts:
        figure.text(x / width, 1 - y / height, text, ha=align, va="center", **_font(text, px, color))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def image_rows(rows: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Lay out rows of images, each [N, H, W, C] with one N, H, W, with a label before each row."""
    tiles = [np.asarray(_to_tile(image, _ROW_TILE_PX)) for row in rows for image in row]
    height = tiles[0].shape[0] + 6
    grid = make_grid(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2), nrow=len(rows[0]), padding=6, pad_value=255)
    left = _MARGIN + 10 * max(map(len, labels))
    page = Image.new("RGB", (left + grid.shape[2] + _MARGIN, grid.shape[1] + 2 * _MARGIN), "white")
    page.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (left, _MARGIN))
    middles = [_MARGIN + number * height + height // 2 for number in range(len(labels))]
    return _draw_page(page, [(left - 8, y, text, _CAPTION_PX, _INK, "right") for y, text in zip(middles, labels)])


@dataclass(frozen=True)
class Prediction:
    """An image, its class, the predicted class and its probability."""

    image: np.ndarray
    true: str
    predicted: str
    prob: float

    @property
    def is_right(self) -> bool:
        """Whether the prediction is right."""
        return self.true == self.predicted


def prediction_grid(predictions: Sequence[Prediction], title: str) -> np.ndarray:
    """Draw images with class and prediction under each, in blue where right and in red where wrong."""
    captions = []
    for item in predictions:
        mark = "✓" if item.is_right else f"→ {shorten(legible(item.predicted), 14)}"
        lines = (shorten(legible(item.true), 20), f"{mark} ({item.prob:.2f})")
        captions.append([(line, item.is_right) for line in lines])
    return _draw_grid([_to_tile(item.image, _GRID_TILE_PX) for item in predictions], captions, title, _GRID_COLUMNS)


def caption_grid(
    images: Sequence[np.ndarray], captions: Sequence[Sequence[tuple[str, bool]]], title: str
) -> np.ndarray:
    """Draw images with lines under each, in blue where their flag is true and in red where not; long ones are cut."""
    lines = [[(shorten(legible(text), 30), flag) for text, flag in item] for item in captions]
    return _draw_grid([_to_tile(image, 2 * _GRID_TILE_PX) for image in images], lines, title, _GRID_COLUMNS // 2)


def _draw_grid(
    tiles: Sequence[Image.Image], captions: Sequence[Sequence[tuple[str, bool]]], title: str, columns: int
) -> np.ndarray:
    """Draw tiles in rows, each with lines under it, below a title whose first line is larger."""
    columns, line_px = min(columns, max(1, len(tiles))), 22
    cell = max([0, *(tile.width for tile in tiles)] + [10 * len(text) for lines in captions for text, _ in lines]) + 16
    row = max([tile.height for tile in tiles], default=0) + line_px * max(map(len, captions), default=0) + 20
    heading = title.split("\n")
    top = _MARGIN + 32 * len(heading)
    sizes = [_TITLE_PX] + [_CAPTION_PX] * len(heading)
    width = max(columns * cell, *(round(_WIDTH_OF_CHAR * px * len(line)) for line, px in zip(heading, sizes)))
    width += 2 * _MARGIN
    page = Image.new("RGB", (width, top + -(-len(tiles) // columns) * row + _MARGIN), "white")
    texts = [
        (_MARGIN, _MARGIN + 32 * number, line, _CAPTION_PX if number else _TITLE_PX, _QUIET if number else _INK, "left")
        for number, line in enumerate(heading)
    ]
    for place, (tile, lines) in enumerate(zip(tiles, captions)):
        centre, y = _MARGIN + place % columns * cell + cell // 2, top + place // columns * row
        page.paste(
            ImageOps.expand(tile, 1, _FRAME), (centre - tile.width // 2 - 1, y - 1)
        )  # white has no edge on white
        for number, (line, flag) in enumerate(lines):
            middle = y + tile.height + 16 + line_px * number
            texts.append((centre, middle, line, _CAPTION_PX, _RIGHT if flag else _WRONG, "center"))
    return _draw_page(page, texts)


def confusion_matrix(
    counts: np.ndarray,
    samples: np.ndarray,
    names: Sequence[str],
    title: str,
    *,
    percent: bool = False,
    elsewhere: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a confusion matrix: rows are true classes, shaded by their share of the row's samples.

    counts: [N, N], row true, column predicted; samples: [N], each class's images. `percent` writes shares of the row
    in place of counts. elsewhere: [N], predictions of classes that are not shown, as a separate column.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    from utils.record.plots import figure_to_image

    number, totals = len(names), np.maximum(np.asarray(samples), 1)[:, None]
    cell = 0.9 if number <= 6 else 0.7 if number <= 12 else 0.46
    shown = [shorten(legible(name), 24) for name in names]
    flat = max(map(len, shown), default=0) * 0.1 < cell
    # A character alone may have many look-alikes: a row also says which it is.
    rows = [text if text == name or len(text) > 2 else f"{text}  {name}" for text, name in zip(shown, names)]
    # Inches around the matrix: matplotlib's layout engines draw everything again to measure it.
    side, right = 0.7 + 0.11 * max(map(len, rows), default=0), 2.0
    top, bottom = 1.2 + (0.0 if flat else 0.11 * max(map(len, shown), default=0)), 0.2
    title_width = 0.3 + _WIDTH_OF_CHAR * 18 * max(map(len, title.split("\n"))) / _DPI
    width, height = max(cell * number + side + right, title_width), cell * number + top + bottom
    figure = Figure(figsize=(width, height), dpi=_DPI)
    axis = figure.add_axes((side / width, bottom / height, cell * number / width, cell * number / height))
    shares = np.asarray(counts) / totals
    ConfusionMatrixDisplay(shares, display_labels=shown).plot(
        include_values=False, cmap="Blues", ax=axis, colorbar=False, im_kw={"norm": PowerNorm(0.7, 0, 1)},
    )  # fmt: skip
    axis.xaxis.tick_top()
    axis.tick_params("x", labelrotation=0 if flat else 90)
    axis.xaxis.set_label_position("top")
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_yticks(range(number), rows)
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set(**_font(label.get_text(), _CAPTION_PX))
    figure.text(0.15 / width, 1 - 0.3 / height, title, va="center", **_font(title, 18))

    def write(x: float, y: float, text: str, color: str) -> None:
        axis.text(x, y, text, ha="center", va="center", **_font(text, 13, color))

    for row, column in zip(*np.nonzero(counts)):
        share = shares[row, column]
        text = f"{100 * share:.0f}" if percent else f"{counts[row, column]:,}"
        write(column, row, text, "white" if share > 0.45 else _INK)
    extra = {"images": samples} if elsewhere is None else {"other": elsewhere, "images": samples}
    for place, (name, values) in enumerate(extra.items()):
        x = number - 0.5 + (0.5 + 0.8 * place) / cell
        write(x, -0.5 - 0.25 / cell, name, _QUIET)
        for row, value in enumerate(values):
            as_share = percent and name == "other" and samples[row]
            text = f"{100 * value / samples[row]:.0f}" if as_share else f"{value:,}"
            write(x, row, text if value or name == "images" else "", _QUIET)
    return figure_to_image(figure)
