"""Reference values of the official ConvNeXt V2: the logits of the dense network and the loss of FCMAE, of one image.

    git clone https://github.com/facebookresearch/ConvNeXt-V2 FOLDER
    python -m tests.models.official_convnextv2 FOLDER

It prints the literals of tests/models/test_official.py, in float64. Weights, image and mask are formulas, so that the
official networks and ours begin equal without a file. MinkowskiEngine, which the official FCMAE needs, is compiled for
GPUs; the classes below have its names and compute the same on one dense map and the map of its sites, for one image.
"""

import importlib
import re
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DEPTHS, DIMS, CLASSES, DECODER_DIM = [1, 2, 1, 1], [4, 8, 12, 16], 5, 8
PATCH_PX, SIDE_PX, VISIBLE = 32, 96, [1, 3, 8]


def wave(shape, shift):
    """Numbers from -1 to 1, by a formula."""
    count = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + shift).view(shape)


def formula_weights(shapes):
    """A tensor for each name: norm scales near 1, everything else near 0."""
    return {
        name: (1.0 if re.search(r"norm\S*\.weight|downsample_layers\.(0\.1|[1-3]\.0)\.weight", name) else 0.0)
        + 0.3 * wave(shapes[name], number)
        for number, name in enumerate(sorted(shapes))
    }


def formula_image():
    """An image [1, 3, H, W]."""
    return wave((1, 3, SIDE_PX, SIDE_PX), 0.1)


def formula_mask():
    """The mask of its patches, bool [1, L]; True is removed."""
    mask = torch.ones(1, (SIDE_PX // PATCH_PX) ** 2, dtype=torch.bool)
    mask[:, VISIBLE] = False
    return mask


class SparseTensor:
    """Features [N, C] at the sites of a map, bool [H, W]; MinkowskiEngine's coordinates are this map."""

    coordinate_manager = None

    def __init__(self, features, coordinate_map_key, coordinate_manager=None):
        self.F, self.coordinate_map_key = features, coordinate_map_key

    def __add__(self, other):
        return SparseTensor(self.F + other.F, self.coordinate_map_key)

    def dense(self):
        """The map [1, C, H, W], 0 at other sites; MinkowskiEngine returns it first of three."""
        full = self.F.new_zeros(1, self.F.shape[1], *self.coordinate_map_key.shape)
        full[0, :, self.coordinate_map_key] = self.F.T
        return (full,)


def to_sparse(full):
    """The sites of a map [1, C, H, W] that are not 0."""
    sites = full[0].ne(0).any(dim=0)
    return SparseTensor(full[0, :, sites].T, sites)


class MinkowskiConvolution(nn.Module):
    """A convolution without overlap. `kernel` has the shape of a dense layer."""

    groups, padding = 1, 0

    def __init__(self, inputs, outputs, kernel_size, stride, bias, dimension):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(outputs, inputs // self.groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride

    def forward(self, x):
        full = F.conv2d(x.dense()[0], self.kernel, self.bias, self.stride, self.padding, groups=self.groups)
        sites = F.max_pool2d(x.coordinate_map_key[None].double(), self.stride)[0] > 0
        return SparseTensor(full[0, :, sites].T, sites)


class MinkowskiDepthwiseConvolution(MinkowskiConvolution):
    """A depthwise convolution at the sites, which reads 0 elsewhere."""

    def __init__(self, channels, kernel_size, bias, dimension):
        self.groups, self.padding = channels, kernel_size // 2
        super().__init__(channels, channels, kernel_size, 1, bias, dimension)


class MinkowskiLinear(nn.Module):
    """A linear layer at each site."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return SparseTensor(self.linear(x.F), x.coordinate_map_key)


class MinkowskiGELU(nn.Module):
    """GELU at each site."""

    def forward(self, x):
        return SparseTensor(F.gelu(x.F), x.coordinate_map_key)


def fill(network):
    """Give a network the weights of the formula, by the dense names; float64."""
    tensors = {}
    for name, tensor in network.double().state_dict().items():
        dense = re.sub(r"\.(ln|linear)\.", ".", name).replace(".kernel", ".weight")
        tensors[dense] = tensor.view(1, 1, 1, -1) if ".grn." in dense else tensor
    for name, values in formula_weights({name: tensor.shape for name, tensor in tensors.items()}).items():
        tensors[name].copy_(values)
    return network.eval()


@torch.no_grad()
def main(folder):
    """Print the literals."""
    engine = types.ModuleType("MinkowskiEngine")
    for part in (SparseTensor, MinkowskiConvolution, MinkowskiDepthwiseConvolution, MinkowskiLinear, MinkowskiGELU):
        setattr(engine, part.__name__, part)
    operations = types.ModuleType("MinkowskiOps")
    operations.to_sparse = to_sparse
    package = types.ModuleType("official")
    package.__path__ = [str(Path(folder) / "models")]
    sys.modules.update({"MinkowskiEngine": engine, "MinkowskiOps": operations, "official": package})
    sizes = {"depths": DEPTHS, "dims": DIMS}
    dense = fill(importlib.import_module("official.convnextv2").ConvNeXtV2(num_classes=CLASSES, **sizes))
    print("LOGITS =", dense(formula_image())[0].tolist())
    masked = fill(importlib.import_module("official.fcmae").FCMAE(
        img_size=SIDE_PX, decoder_embed_dim=DECODER_DIM, patch_size=PATCH_PX, norm_pix_loss=True, **sizes
    ))  # fmt: skip
    masked.gen_random_mask = lambda images, ratio: formula_mask().double()
    loss, predicted, _ = masked(formula_image())
    print("SQUARES =", predicted.flatten(2)[:, :, formula_mask()[0]].square().mean().item())
    print("LOSS =", loss.item())


if __name__ == "__main__":
    main(sys.argv[1])
