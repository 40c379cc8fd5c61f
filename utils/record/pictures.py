"""Pictures of predictions, drawn by Pillow in about ten milliseconds each, so that they cost training little.

All take and return uint8 arrays: an image is [H, W, C] with 1 or 3 channels, a picture [H', W', 3].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from utils.record.lettering import Color, closed, draw_text, fit, legible, text_width, upright_text

_PAPER: Color = (255, 255, 255)
_INK: Color = (33, 37, 41)
_QUIET: Color = (108, 117, 125)
_FRAME: Color = (206, 212, 218)
_RIGHT: Color = (8, 81, 156)
_WRONG: Color = (190, 24, 29)
_MARGIN, _TITLE_PX, _CAPTION_PX, _NOTE_PX = 24, 22, 18, 16
_ROW_TILE_PX, _GRID_TILE_PX, _GRID_COLUMNS = 96, 112, 8
_CORNER = "true ↓  predicted →"


def image_rows(rows: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Lay out rows of images, each [N, H, W, C] with one N, H, W, with a label before each row."""
    tiles = [[_to_tile(image, _ROW_TILE_PX) for image in row] for row in rows]
    width, height = tiles[0][0].size
    left, gap = _MARGIN + max(text_width(label, _NOTE_PX) for label in labels) + 16, 6
    size = (
        left + len(tiles[0]) * (width + gap) - gap + _MARGIN,
        2 * _MARGIN + len(tiles) * (height + gap) - gap,
    )
    page = Image.new("RGB", size, _PAPER)
    for number, (line, label) in enumerate(zip(tiles, labels)):
        top = _MARGIN + number * (height + gap)
        draw_text(page, left - 16, top + height // 2, label, _NOTE_PX, _INK, "right")
        for place, tile in enumerate(line):
            _paste_framed(page, tile, left + place * (width + gap), top)
    return np.asarray(page)


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
    """Draw images with `true → predicted (probability)` under each, in blue where right and in red where wrong.

    Names that one line does not hold take two; longer ones are cut.
    """
    tiles = [_to_tile(item.image, _GRID_TILE_PX) for item in predictions]
    lines = [_caption(item, split=False) for item in predictions]
    widest, most = max([text_width(line, _CAPTION_PX) for (line,) in lines], default=0), round(1.8 * _GRID_TILE_PX)
    if widest > most:
        lines = [_caption(item, split=True, most=most) for item in predictions]
        widest = max(text_width(line, _CAPTION_PX) for pair in lines for line in pair)
    cell = max([tile.width for tile in tiles] + [min(widest, most)]) + 16
    text_height = max(map(len, lines), default=0) * 24
    row = max([tile.height for tile in tiles], default=0) + text_height + 20
    count = -(-len(tiles) // _GRID_COLUMNS)
    page, top = _titled_page(title, min(_GRID_COLUMNS, len(tiles)) * cell, count * row)
    for place, (item, tile, caption) in enumerate(zip(predictions, tiles, lines)):
        centre, y = _MARGIN + place % _GRID_COLUMNS * cell + cell // 2, top + place // _GRID_COLUMNS * row
        _paste_framed(page, tile, centre - tile.width // 2, y)
        for number, line in enumerate(caption):
            color = _RIGHT if item.is_right else _WRONG
            draw_text(page, centre, y + tile.height + 18 + 24 * number, line, _CAPTION_PX, color, "centre")
    return np.asarray(page)


def caption_grid(
    images: Sequence[np.ndarray], captions: Sequence[Sequence[tuple[str, bool]]], title: str
) -> np.ndarray:
    """Draw images with lines under each, in blue where their flag is true and in red where not; long ones are cut."""
    tiles, most = [_to_tile(image, 2 * _GRID_TILE_PX) for image in images], 2 * _GRID_TILE_PX
    cell, height = most + 20, max([tile.height for tile in tiles], default=0)
    row = height + 24 * max(map(len, captions), default=0) + 28
    columns = min(_GRID_COLUMNS // 2, max(1, len(tiles)))
    page, top = _titled_page(title, columns * cell, -(-len(tiles) // columns) * row)
    for place, (tile, lines) in enumerate(zip(tiles, captions)):
        centre, y = _MARGIN + place % columns * cell + cell // 2, top + place // columns * row
        _paste_framed(page, tile, centre - tile.width // 2, y)
        for number, (line, flag) in enumerate(lines):
            text = fit(line, _CAPTION_PX, most)
            draw_text(
                page, centre, y + height + 18 + 24 * number, text, _CAPTION_PX, _RIGHT if flag else _WRONG, "centre"
            )
    return np.asarray(page)


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
    number = len(names)
    cell = 96 if number <= 6 else 72 if number <= 12 else 46 if number <= 24 else 38
    px = 18 if number <= 24 else 16
    shown = [legible(name) for name in names]
    # A character alone may have many look-alikes: a row also says which it is.
    row_names = [text if text == name or len(text) > 2 else f"{text}  {name}" for text, name in zip(shown, names)]
    row_names = [fit(name, px, 320) for name in row_names]
    column_names = [fit(name, px, 240) for name in shown]
    extra = [("images", samples)] if elsewhere is None else [("other", elsewhere), ("images", samples)]
    side = max(text_width(name, px) for name in [*row_names, _CORNER]) + 14
    flat = [text_width(name, px) <= cell - 6 for name in column_names]
    head = max([2 * px, *(text_width(name, px) + 14 for name, fits in zip(column_names, flat) if not fits)])
    page, top = _titled_page(title, side + number * cell + 16 + len(extra) * max(cell, 64), head + number * cell)
    left, first = _MARGIN + side, top + head
    draw_text(page, left - 14, first - px, _CORNER, _NOTE_PX, _QUIET, "right")
    for place, name in enumerate(column_names):
        _draw_heading(page, left + place * cell + cell // 2, first, name, px, _INK, flat[place])
    pen = ImageDraw.Draw(page)
    for row in range(number):
        middle = first + row * cell + cell // 2
        draw_text(page, left - 14, middle, row_names[row], px, _INK if samples[row] else _QUIET, "right")
        for column in range(number):
            x, count = left + column * cell, int(counts[row, column])
            share = count / samples[row] if samples[row] else 0.0
            fill = _shade(_RIGHT if row == column else _WRONG, share)
            pen.rectangle((x, middle - cell // 2, x + cell, middle - cell // 2 + cell), fill=fill, outline=_FRAME)
            if count:
                text = f"{100 * share:.0f}" if percent else f"{count:,}"
                size = min(px, px * (cell - 6) // max(1, text_width(text, px)))
                draw_text(page, x + cell // 2, middle, text, size, _PAPER if share > 0.45 else _INK, "centre")
    for place, (name, values) in enumerate(extra):
        x = left + number * cell + 16 + place * max(cell, 64) + max(cell, 64) // 2
        _draw_heading(page, x, first, name, _NOTE_PX, _QUIET, True)
        for row, value in enumerate(values):
            share = (
                f"{100 * value / samples[row]:.0f}" if percent and name == "other" and samples[row] else f"{value:,}"
            )
            middle = first + row * cell + cell // 2
            draw_text(page, x, middle, share if value or name == "images" else "", px, _QUIET, "centre")
    return np.asarray(page)


def _caption(item: Prediction, *, split: bool, most: int = 0) -> list[str]:
    """Return a caption of one line, or two of at most `most` pixels: names are cut, the probability is kept."""
    true, predicted, prob = legible(item.true), legible(item.predicted), f"({item.prob:.2f})"
    if split:
        predicted = fit(predicted, _CAPTION_PX, most - text_width(f"→  {prob}", _CAPTION_PX))
        return [fit(true, _CAPTION_PX, most), f"✓ {prob}" if item.is_right else f"→ {closed(predicted)} {prob}"]
    return [f"{closed(true)} {prob}" if item.is_right else f"{closed(true)} → {closed(predicted)} {prob}"]


def _titled_page(title: str, width: int, height: int) -> tuple[Image.Image, int]:
    """Return a page that holds a title's lines and so much beneath, and the height at which that begins."""
    lines = [(line, _TITLE_PX if place == 0 else _NOTE_PX) for place, line in enumerate(title.split("\n"))]
    width = max([width, *(text_width(line, px) for line, px in lines)])
    top = _MARGIN + sum(round(1.6 * px) for _, px in lines) + 10
    page, y = Image.new("RGB", (width + 2 * _MARGIN, top + height + _MARGIN), _PAPER), _MARGIN
    for line, px in lines:
        draw_text(page, _MARGIN, y + px // 2, line, px, _INK if px == _TITLE_PX else _QUIET)
        y += round(1.6 * px)
    return page, top


def _draw_heading(page: Image.Image, x: int, bottom: int, text: str, px: int, color: Color, flat: bool) -> None:
    """Write a column's name above it."""
    if flat:
        draw_text(page, x, bottom - px, text, px, color, "centre")
    else:
        line = upright_text(text, px, color, _PAPER)
        page.paste(line, (x - line.width // 2, bottom - 6 - line.height))


def _to_tile(image: np.ndarray, tile_px: int) -> Image.Image:
    """Return an image at about `tile_px` pixels; small ones by whole factors, so that their pixels stay visible."""
    picture = Image.fromarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image))
    longest = max(picture.size)
    if tile_px // longest >= 2:
        factor = tile_px // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = [max(1, math.floor(side * tile_px / longest)) for side in picture.size]
    return picture.resize(tuple(size), Image.Resampling.LANCZOS)


def _paste_framed(page: Image.Image, tile: Image.Image, x: int, y: int) -> None:
    """Paste an image with a thin frame: a white image on white paper has no edge."""
    ImageDraw.Draw(page).rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=_FRAME)
    page.paste(tile, (x, y))


def _shade(color: Color, share: float) -> Color:
    """Return paper tinted by a share of a colour; the root lets small shares be seen."""
    strength = share**0.7
    return tuple(round(paper + (tint - paper) * strength) for paper, tint in zip(_PAPER, color))
