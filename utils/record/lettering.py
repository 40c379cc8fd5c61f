"""Text in pictures: words of any script that a font at hand can draw, set by Pillow.

DejaVu Sans and STIX, which matplotlib ships, come first; a character that both lack is looked for in the fonts of the
machine, and written as its code point (U+732B) where none has it.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

Color = tuple[int, int, int]
_CODE_POINT = re.compile(r"U\+([0-9A-F]{4,6})")
# The direction of the line, not of its words: an Arabic name runs to the left, `true → predicted` to the right. Only
# Raqm supports directions, and some builds of Pillow do not have it.
_DIRECTION = "ltr" if features.check("raqm") else None
_LONGEST = 200  # characters of a name that are looked at; no picture has room for more


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
        if kind in "ZC" or _font_with(char) is None:  # separators and controls are blank
            return name
        return f"◌{char}" if kind == "M" else char
    flat = " ".join(name[:_LONGEST].split())
    return "".join(char if _font_with(char) is not None else f"U+{ord(char):04X}" for char in flat)


def closed(name: str) -> str:
    """Return a name for use within a line: right-to-left text does not reorder what follows it."""
    leftward = _DIRECTION is not None and any(unicodedata.bidirectional(char) in ("R", "AL") for char in name)
    return f"{name}\N{LEFT-TO-RIGHT MARK}" if leftward else name


def text_width(text: str, px: int) -> int:
    """Return the width of a line of text at a size."""
    return round(sum(_load(file, px).getlength(run, direction=_DIRECTION) for file, run in _runs(text)))


def fit(text: str, px: int, width: int) -> str:
    """Return the text, with an ellipsis in its middle where it is wider: names often differ at their ends."""
    if text_width(text, px) <= width:
        return text
    kept = len(text)
    while kept > 1:
        kept -= 1
        cut = text[: -(-kept // 2)].rstrip() + "…" + text[len(text) - kept // 2 :].lstrip()
        if text_width(cut, px) <= width:
            return cut
    return "…"


def draw_text(image: Image.Image, x: int, y: int, text: str, px: int, color: Color, align: str = "left") -> None:
    """Draw a line of text into an image, with its capitals' middle at height y.

    align: what x is of the text: left, centre or right.
    """
    pen, left = ImageDraw.Draw(image), float(x)
    left -= {"left": 0.0, "centre": 0.5, "right": 1.0}[align] * text_width(text, px)
    baseline = y + round(0.36 * px)
    for file, run in _runs(text):
        font = _load(file, px)
        pen.text((round(left), baseline), run, fill=color, font=font, anchor="ls", direction=_DIRECTION)
        left += font.getlength(run, direction=_DIRECTION)


def upright_text(text: str, px: int, color: Color, background: Color) -> Image.Image:
    """Return a line of text that reads from bottom to top, as an image that it fills."""
    line = Image.new("RGB", (max(1, text_width(text, px)), round(1.4 * px)), background)
    draw_text(line, 0, line.height // 2, text, px, color)
    return line.transpose(Image.Transpose.ROTATE_90)


@functools.lru_cache(maxsize=64)
def _load(file: str, px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, px)


@functools.lru_cache(maxsize=256)
def _characters(file: str) -> frozenset[int]:
    """Return the code points that a font file has; none where it cannot be read or is not scalable."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(file, lazy=True, fontNumber=0) as font:
            return frozenset(font.getBestCmap() or ())
    except (TTLibError, OSError):
        return frozenset()  # a damaged font of the machine draws nothing, like an absent one


@functools.cache
def _shipped_fonts() -> tuple[str, ...]:
    import matplotlib  # takes 0.1 s

    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return tuple(str(folder / f"{face}.ttf") for face in ("DejaVuSans", "STIXGeneral"))


@functools.cache
def _machine_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    return tuple(sorted(font_manager.findSystemFonts()))


@functools.lru_cache(maxsize=65536)
def _font_with(char: str) -> str | None:
    """Return the first font file that has a character."""
    for fonts in (_shipped_fonts, _machine_fonts):
        found = _first(fonts(), lambda file: ord(char) in _characters(file))
        if found is not None:
            return found
    return None


def _first(items: tuple[str, ...], fits: Callable[[str], Any]) -> str | None:
    return next((item for item in items if fits(item)), None)


def _runs(text: str) -> list[tuple[str, str]]:
    """Return (font file, piece) for the pieces of a text that one font can draw."""
    files = [_font_with(char) or _shipped_fonts()[0] for char in text]
    if len(set(files)) > 1:
        whole = _first(tuple(dict.fromkeys(files)), lambda file: all(ord(char) in _characters(file) for char in text))
        files = files if whole is None else [whole] * len(files)
    pieces = groupby(zip(files, text), key=lambda pair: pair[0])
    return [(file, "".join(char for _, char in piece)) for file, piece in pieces]
