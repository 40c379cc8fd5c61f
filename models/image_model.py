"""A network with its normalisation and its output, and the form of its ONNX file, which another program may define."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.normalise import Normalise
from models.outputs import OUTPUTS
from utils.errors import UserError

_Levels = float | Annotated[list[float], Field(min_length=3, max_length=3)]


class OnnxForm(BaseModel):
    """Named outputs, and an input (images - mean) / std for RGB images in [0, 1].

    mean, std: for all channels, or for red, green and blue. outputs: from the file's output names, in order, to logits,
    probs, embedding or features. Files have it in their metadata and may come from a stranger.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    input: str = "images"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    mean: _Levels = 0.0
    std: _Levels = 1.0
    outputs: dict[str, str]

    def to_input(self, images: Tensor) -> Tensor:
        """Convert RGB images in [0, 1], float32 [B, C, H, W], to the file's input."""
        mean, std = self._levels()
        images = (images - mean) / std
        images = images.flip(1) if self.channels == "BGR" else images
        return (images.permute(0, 2, 3, 1) if self.layout == "NHWC" else images).contiguous()

    def to_images(self, inputs: Tensor) -> Tensor:
        """Convert the file's input to RGB images in [0, 1], float32 [B, C, H, W]."""
        mean, std = self._levels()
        images = inputs.permute(0, 3, 1, 2) if self.layout == "NHWC" else inputs
        return (images.flip(1) if self.channels == "BGR" else images) * std + mean

    def _levels(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)


def find_head(network: nn.Module, key: str = "task.head", advice: str = "set task.head=drawn") -> nn.Linear:
    """Return the layer that outputs logits. Raises UserError (`key`, with advice) if it is not a linear layer."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else getattr(network, "head", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise UserError(
            f"{key}: a network that ends in one linear layer with a bias is needed, but {type(network).__name__} ends "
            f"in {type(head).__name__}; {advice}"
        )
    return head


class ImageModel(nn.Module):
    """A trained network with its normalisation, for images [B, C, H, W], uint8 or float in [0, 1].

    output_name: a name in models/outputs.py.
    """

    def __init__(self, network: nn.Module, normalise: Normalise, output_name: str) -> None:
        super().__init__()
        self.network, self.normalise, self.output_name = network, normalise, output_name
        self.output = OUTPUTS[output_name]
        self.form = OnnxForm(outputs={name: name for name in self.output.heads})  # of its ONNX file

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return float32 (logits, probs) [B, K], or (features,) [B, C]."""
        outputs = self.network(self.normalise(images)).float()
        return (outputs,) if self.output.activate is None else (outputs, self.output.activate(outputs))

    def embed(self, images: Tensor) -> Tensor:
        """Return the head's input, float32 [B, C], or the features of a network without a head."""
        if self.output.activate is None:
            return self(images)[-1]
        features = self.network.forward_features(self.normalise(images))
        return self.network.forward_head(features, pre_logits=True).float()

    def with_network(self, network: nn.Module) -> "ImageModel":
        """Return a copy with another network, in eval mode."""
        return ImageModel(network, self.normalise, self.output_name).eval()
