"""A tagger as the programs that read taggers want it: their input, their outputs, their order of the tags.

| form | input | outputs |
|---|---|---|
| wd14 | `input` [B, H, W, 3], BGR, 0 to 255 | `output` (probabilities), `embedding` |
| imgutils | `input` [B, 3, H, W], RGB, normalised as in training | `prediction`, `embedding`, `logits` |
| cl_tagger | `input` [B, 3, H, W], BGR, -1 to 1 | `logits`, `probs` |

The embedding [B, D] is what the head reads. Normalisation, order of channels and layout are inside the graph.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.export.parity import refuse_difference, vary_weights
from models.image_model import ImageModel, find_head
from models.normalise import Normalise
from models.onnx_form import OnnxForm
from utils.errors import UserError

_NEVER = -1e4  # the logit of an output that the vocabulary lacks; its sigmoid is 0 in float32, and fp16 holds it
_TOLERANCE = 1e-4  # of probabilities, between two forms of one network in PyTorch


def make_form(name: str, preprocessing: Mapping[str, Any]) -> OnnxForm:
    """Return a form of the table above."""
    if name == "wd14":
        outputs = {"output": "probs", "embedding": "embedding"}
        return OnnxForm(input="input", layout="NHWC", channels="BGR", std=1 / 255, outputs=outputs)
    if name == "imgutils":
        outputs = {"prediction": "probs", "embedding": "embedding", "logits": "logits"}
        return OnnxForm(input="input", mean=preprocessing["mean"], std=preprocessing["std"], outputs=outputs)
    return OnnxForm(input="input", channels="BGR", mean=0.5, std=0.5, outputs={"logits": "logits", "probs": "probs"})


class TagGraph(ImageModel):
    """A tagger in a form: from what its file takes to what its file gives."""

    def __init__(self, network: nn.Module, normalise: Normalise, form: OnnxForm) -> None:
        super().__init__(network, normalise, "tags")
        self.form = form

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the form, float32 [B, K] or [B, D]."""
        features = self.network.forward_features(self.normalise(self.form.to_images(images)))
        embedding = self.network.forward_head(features, pre_logits=True)
        logits = self.network.get_classifier()(embedding).float()
        made = {"logits": logits, "probs": logits.sigmoid(), "embedding": embedding.float()}
        return tuple(made[what] for what in self.form.outputs.values())

    def with_network(self, network: nn.Module) -> "TagGraph":
        """Return the same, in eval mode, around another network."""
        return TagGraph(network, self.normalise, self.form).eval()


@torch.no_grad()
def reorder_head(network: nn.Module, rows: Sequence[int]) -> nn.Module:
    """Return a copy of a network whose output i is output `rows[i]`; -1 makes one whose probability is always 0.

    Raises UserError (`format`) where it does not end in one linear layer.
    """
    made, order = copy.deepcopy(network), torch.tensor(rows)
    head, absent = find_head(made, "format", "set format=onnx or safetensors"), order < 0
    head.weight = nn.Parameter(head.weight[order.clamp_min(0)].masked_fill(absent[:, None], 0.0))
    head.bias = nn.Parameter(head.bias[order.clamp_min(0)].masked_fill(absent, _NEVER))
    head.out_features = len(rows)
    return made


def make_graph(model: ImageModel, form: OnnxForm, rows: Sequence[int], image_size_hw: Sequence[int]) -> TagGraph:
    """Return a tagger in a form, whose output i is the model's output `rows[i]` (`reorder_head`).

    It is compared with the model, and again with varied weights. Raises UserError (`tolerance`) where they differ.
    """
    images = torch.rand(2, 3, *image_size_hw, generator=torch.Generator().manual_seed(0))
    for one in (model.with_network(vary_weights(model.network)), model):
        graph = TagGraph(reorder_head(one.network, rows), one.normalise, form).eval()
        _refuse_other_probs(one, graph, rows, images)
    return graph


@torch.inference_mode()
def _refuse_other_probs(model: ImageModel, graph: TagGraph, rows: Sequence[int], images: Tensor) -> None:
    wanted = model(images)[1][:, list(rows)].masked_fill(torch.tensor(rows) < 0, 0.0)
    found = graph(graph.form.to_input(images))[list(graph.form.outputs.values()).index("probs")]
    refuse_difference(float((found - wanted).abs().max()), _TOLERANCE, "the network taken apart for its embedding")


@torch.no_grad()
def to_bgr(network: nn.Module, image_size_hw: Sequence[int]) -> nn.Module:
    """Return a copy of a network that takes blue, green and red instead of red, green and blue.

    Raises UserError (`format`) where turning its first convolution round does not do that.
    """
    images = torch.randn(2, 3, *image_size_hw, generator=torch.Generator().manual_seed(0))
    varied = vary_weights(network)
    wanted, found = varied(images), _turn_stem(varied)(images.flip(1))
    if not float((found - wanted).abs().max()) <= _TOLERANCE * float(wanted.abs().max()):
        raise UserError(
            f"format: timm's taggers take BGR, and {type(network).__name__} does not begin with one convolution of "
            "three channels that could be turned round; set format=wd14 or safetensors"
        )
    return _turn_stem(network)


def _turn_stem(network: nn.Module) -> nn.Module:
    made = copy.deepcopy(network).eval()
    stem = next((module for module in made.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is not None and stem.in_channels == 3:
        stem.weight.data = stem.weight.data.flip(1)
    return made
