"""How an image file becomes a network's input: one description, stored in weight files and exports.

Training's evaluation and predict.py run it (data/images/prepare.py), exports state it in the words of
other libraries (models/interop/libraries.py), and the program in an export's card is printed from it
(models/interop/snippets). The steps, in order:

| step | keys |
|---|---|
| decode upright; 16-bit grey as 8 bits | |
| put transparent pixels on the background; RGB or grey | background, channels |
| reduce a longer shorter side to `shortest_px`; a JPEG is decoded at a smaller scale | shortest_px |
| centre the image on a square of the background | pad, background |
| resize the shorter side and crop the centre, or resize both | eval_resize, eval_crop, image_size_hw, interpolation |
| normalise | mean, std |
"""

import math
from typing import Annotated, Literal, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from utils.config.bounds import SizeHW
from utils.formats.background import DEFAULT, Background, background_rgb

# Limits very long images, such as 1 x 50,000 pixels, which would become 256 x 12,800,000: only their middle is resized,
# to at most this many times the image size. With padding, the whole image is first reduced to this many times the size.
LONGEST = 8


class Decoding(BaseModel):
    """How a file becomes an image, uint8. The values may come from a stranger's file."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    channels: int
    background: Background = DEFAULT
    shortest_px: Annotated[int, Field(ge=1)] | None = None

    @property
    def colour(self) -> tuple[int, int, int] | None:
        """The background's colour; None drops transparency."""
        return background_rgb(self.background)

    @property
    def levels(self) -> list[int]:
        """The level of padding in each channel."""
        colour = self.colour or (255, 255, 255)  # white for `drop`
        return [*colour] if self.channels == 3 else [Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))]


class Preprocessing(Decoding):
    """How a file becomes a network's input."""

    channels: Literal[1, 3]
    image_size_hw: SizeHW
    interpolation: Literal["bilinear", "bicubic"]
    pad: Literal["none", "square"] = "none"
    eval_resize: Literal["crop", "squash"] = "crop"
    eval_crop: Annotated[float, Field(gt=0.01, le=1)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]

    @model_validator(mode="after")
    def _one_per_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} for {self.channels} channels")
        return self

    @property
    def squashes(self) -> bool:
        """Whether both sides are resized; else the centre is cropped."""
        return self.eval_resize == "squash"

    @property
    def resized_hw(self) -> list[int]:
        """The height and width that a resized image must cover before the centre is cropped, rounded down."""
        return [math.floor(side / self.eval_crop) for side in self.image_size_hw]

    @property
    def longest_px(self) -> int:
        """The longer side to which an image is reduced before it is padded."""
        return LONGEST * max(self.image_size_hw)
