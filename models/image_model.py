"""A network with its normalisation and its output."""

from torch import Tensor, nn

from models.normalise import Normalise
from models.onnx_form import OnnxForm
from models.outputs import OUTPUTS
from utils.errors import UserError


def find_head(network: nn.Module, key: str = "task.head", advice: str = "set task.head=drawn") -> nn.Linear:
    """Return the layer that outputs logits. Raises UserError (`key`, with advice) where it is not a linear layer."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else getattr(network, "head", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise UserError(
            f"{key}: a network that ends in one linear layer with a bias is needed, and {type(network).__name__} ends "
            f"in {type(head).__name__}; {advice}"
        )
    return head


class ImageModel(nn.Module):
    """A trained network with its normalisation: uint8, or float in [0, 1], [B, C, H, W] to its outputs.

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
        """Return what the head reads, float32 [B, C]; of a network without a head its features."""
        if self.output.activate is None:
            return self(images)[-1]
        features = self.network.forward_features(self.normalise(images))
        return self.network.forward_head(features, pre_logits=True).float()

    def with_network(self, network: nn.Module) -> "ImageModel":
        """Return the same, in eval mode, around another network."""
        return ImageModel(network, self.normalise, self.output_name).eval()
