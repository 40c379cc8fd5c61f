"""The form of an ONNX file: what it takes and what it gives. What other programs read has forms of its own."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

_Levels = float | Annotated[list[float], Field(min_length=3, max_length=3)]


class OnnxForm(BaseModel):
    """An input of (images - mean) / std, where images are RGB in [0, 1], and named outputs.

    mean, std: of all channels, or of red, green and blue. outputs: logits, probs, embedding or features by the name of
    the file's output, in their order. It is in the metadata of a file, which may come from a stranger.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    input: str = "images"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    mean: _Levels = 0.0
    std: _Levels = 1.0
    outputs: dict[str, str]

    def to_input(self, images: Tensor) -> Tensor:
        """Return what a file takes for RGB images in [0, 1], float32 [B, C, H, W]."""
        mean, std = self._levels()
        images = (images - mean) / std
        images = images.flip(1) if self.channels == "BGR" else images
        return (images.permute(0, 2, 3, 1) if self.layout == "NHWC" else images).contiguous()

    def to_images(self, taken: Tensor) -> Tensor:
        """Return RGB images in [0, 1], float32 [B, C, H, W], of what a file takes."""
        mean, std = self._levels()
        images = taken.permute(0, 3, 1, 2) if self.layout == "NHWC" else taken
        return (images.flip(1) if self.channels == "BGR" else images) * std + mean

    def _levels(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
