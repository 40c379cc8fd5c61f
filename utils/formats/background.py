"""The background behind transparent images: a setting that weight files and exports keep."""

from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import Field

from utils.config.bounds import between

_Level = between(int, 0, 255)
# `drop` discards alpha, as Pillow's convert("RGB") does: the colours of transparent pixels become visible.
Background = Literal["white", "black", "drop"] | _Level | Annotated[list[_Level], Field(min_length=3, max_length=3)]
DEFAULT = "white"


def background_rgb(background: Any) -> tuple[int, int, int] | None:
    """Return the colour of a background; None for `drop`."""
    if background == "drop":
        return None
    if isinstance(background, str):
        return ImageColor.getrgb(background)
    return tuple(background) if isinstance(background, list | tuple) else (background,) * 3
