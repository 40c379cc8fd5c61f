"""A network with its normalisation and its output: classes, tags or features."""

from typing import Literal

from torch import Tensor, nn

from models.normalise import Normalise

Output = Literal["classes", "tags", "features"]
# The names of an ImageModel's outputs, in order. A prediction uses the last.
OUTPUT_NAMES: dict[Output, tuple[str, ...]] = {
    "classes": ("logits", "probs"),
    "tags": ("logits", "probs"),
    "features": ("features",),
}


class ImageModel(nn.Module):
    """A trained network with its normalisation: uint8, or float in [0, 1], [B, C, H, W] to its outputs."""

    def __init__(self, network: nn.Module, normalise: Normalise, output: Output) -> None:
        super().__init__()
        self.network, self.normalise, self.output = network, normalise, output

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return float32 (logits, probs) [B, K], by softmax for classes and sigmoid for tags; or (features,) [B, C]."""
        outputs = self.network(self.normalise(images)).float()
        match self.output:
            case "classes":
                return outputs, outputs.softmax(dim=1)
            case "tags":
                return outputs, outputs.sigmoid()
            case "features":
                return (outputs,)
