"""The form of an ONNX file, which another program may define: its input and its outputs."""

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

Images = TypeVar("Images", "Tensor", np.ndarray)


class OnnxForm(BaseModel):
    """A file's input, with levels from 0 to `white`, and its named outputs.

    outputs: from the file's output names, in order, to logits, probs, embedding or features. Files have it in their
    metadata and may come from a stranger.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    input: str = "images"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    white: Annotated[float, Field(gt=0)] = 1.0
    is_normalised: bool = False  # levels are, before they come in
    outputs: dict[str, str]

    def to_input(self, images: Images) -> Images:
        """Convert RGB images in [0, 1], float32 [B, C, H, W], to the file's input."""
        images = images if self.white == 1.0 else images * self.white
        images = images[:, [2, 1, 0]] if self.channels == "BGR" else images
        return images.swapaxes(1, 2).swapaxes(2, 3) if self.layout == "NHWC" else images

    def to_images(self, inputs: "Tensor") -> "Tensor":
        """Convert the file's input to RGB images in [0, 1], float32 [B, C, H, W]."""
        images = inputs.permute(0, 3, 1, 2) if self.layout == "NHWC" else inputs
        images = images.flip(1) if self.channels == "BGR" else images
        return images if self.white == 1.0 else images / self.white  # bytes stay bytes
