"""A network with its normalisation and its output, and its predictor."""

import numpy as np
import torch
from torch import Tensor, nn

from models.normalise import Normalise
from models.onnx_form import OnnxForm
from models.outputs import OUTPUTS
from models.predictor import Images, Predictor
from utils.errors import UserError
from utils.io.files import Values

_ROUNDING = 1e-3  # in fp16, of probabilities


def output_layers(network: nn.Module, key: str, advice: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers whose rows are the logits, by name. Some networks of timm average the logits of several.

    Raises UserError (`key`, with advice) if they are not known or not linear with a bias.
    """
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or "head"
    modules = dict(network.named_modules())
    layers = {name: modules[name] for name in ([names] if isinstance(names, str) else names) if name in modules}
    linear = [one for one in layers.values() if isinstance(one, nn.Linear | nn.Conv2d) and one.bias is not None]
    if not layers or len(linear) < len(layers):
        raise UserError(
            f"{key}: a network that ends in linear layers with a bias is needed, but {type(network).__name__} ends "
            f"in {', '.join(type(one).__name__ for one in layers.values()) or 'unknown layers'}; {advice}"
        )
    return layers


def find_head(network: nn.Module) -> nn.Linear:
    """Return the layer from the embedding to the logits. Raises UserError (`task.head`) if it is not linear."""
    head, *others = output_layers(network, "task.head", "set task.head=random").values()
    if others or not isinstance(head, nn.Linear):
        name = type(network).__name__
        raise UserError(f"task.head: one linear layer is needed, but {name} ends in others; set task.head=random")
    return head


class ImageModel(nn.Module):
    """A trained network with its normalisation, for images [B, C, H, W], uint8 or float in [0, 1].

    output_name: a name in models/outputs.py. form: other inputs and outputs, of an ONNX file for another program.
    """

    def __init__(
        self, network: nn.Module, normalise: Normalise, output_name: str, form: OnnxForm | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise = normalise
        self.output_name = output_name
        self.output = OUTPUTS[output_name]
        self.form = form or OnnxForm(outputs={name: name for name in self.output.heads})

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the form, float32: by default (logits, probs) [B, K], or (features,) [B, C]."""
        images = self.normalise(self.form.to_images(images))
        wanted = self.form.outputs.values()
        outputs = {}
        if "embedding" in wanted:
            features = self.network.forward_features(images)
            outputs["embedding"] = self.network.forward_head(features, pre_logits=True).float()
            last = self.network.forward_head(features).float()
        else:
            last = self.network(images).float()
        outputs[self.output.heads[0]] = last
        if self.output.activate is not None:
            outputs["probs"] = self.output.activate(last)
        return tuple(outputs[name] for name in wanted)

    def embed(self, images: Tensor) -> Tensor:
        """Return the head's input, float32 [B, C], or the features of a network without a head."""
        if self.output_name == "features":
            return self(images)[-1]
        features = self.network.forward_features(self.normalise(images))
        return self.network.forward_head(features, pre_logits=True).float()

    def with_network(self, network: nn.Module) -> "ImageModel":
        """Return a copy with another network, in eval mode."""
        return ImageModel(network, self.normalise, self.output_name, self.form).eval()


class Graph(nn.Module):
    """An ONNX file of classes or tags as a network, from images uint8 [B, C, H, W] to logits float32 [B, K]."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self._predictor = predictor

    def forward(self, images: Tensor) -> Tensor:
        """Return finite logits, on the device of the images."""
        probs = torch.from_numpy(self._predictor.predict(images)).to(images.device)
        inner = probs.clamp(1e-30, 1 - 2**-24)
        if (probs - inner).abs().max() > _ROUNDING:
            raise UserError("weights: the outputs are no probabilities; name a file whose graph has the sigmoid")
        return inner.logit() if self._predictor.output.has_tags else inner.log()


def torch_predictor(model: ImageModel, metadata: Values, device: torch.device) -> Predictor:
    """Return the predictor of a model from a weight file."""
    model = model.to(device)

    @torch.inference_mode()
    def run(images: Images, what: str) -> np.ndarray:
        images = torch.as_tensor(images).to(device)
        return (model.embed(images) if what == "embedding" else model(images)[-1]).cpu().numpy()

    return Predictor(metadata, run)
