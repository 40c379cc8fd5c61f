"""Compare a network with what another tool makes of its file.

Logits of a network with small weights hardly vary between images, so that a wrong converter would pass. Every
conversion is therefore tried first on a copy with varied weights: scales of norms near 1, GRN far from the identity.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.io.files import scratch_folder

# From normalised images [B, C, H, W] to what is compared.
Outputs = Callable[[Tensor], Tensor]
_IMAGES = 4
_LEAST_VARIATION = 1e-2


@torch.no_grad()
def vary_weights(network: nn.Module) -> nn.Module:
    """Return a copy of a network, in eval mode, with weights for which its outputs vary between images."""
    varied = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in varied.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "grn" in name:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim <= 1:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
        else:
            parameter.copy_(noise * (2.0 / parameter[0].numel()) ** 0.5)
    return varied


def draw_images(channels: int, size_hw: tuple[int, int]) -> Tensor:
    """Return normalised images of noise, float32 [4, C, H, W]."""
    return torch.randn(_IMAGES, channels, *size_hw, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def difference(wanted: Outputs, found: Outputs, images: Tensor) -> float:
    """Return the greatest difference of two functions of the same images."""
    return float((wanted(images).float() - found(images).float()).abs().max())


@torch.no_grad()
def check_conversion(
    network: nn.Module,
    convert: Callable[[nn.Module, Path], None],
    load: Callable[[Path], Outputs],
    outputs: Callable[[nn.Module], Outputs],
    images: Tensor,
    tolerance: float,
) -> None:
    """Convert a copy with varied weights into a scratch folder, load it as its users do, and compare.

    convert: writes a network's files into a folder. load: returns the target's own network from such a folder. outputs:
    the function of our network that is compared. Raises UserError (`tolerance`) where they differ by more.
    """
    varied = vary_weights(network)
    wanted = outputs(varied)(images)
    assert wanted.std(dim=0).mean() > _LEAST_VARIATION, "the outputs of varied weights hardly vary between images"
    with scratch_folder() as folder:
        convert(varied, folder)
        found = difference(lambda _: wanted, load(folder), images)
    refuse_difference(found / float(wanted.abs().max().clamp(min=1.0)), tolerance, "a copy with varied weights")


def refuse_difference(found: float, tolerance: float, what: str) -> None:
    """Raise UserError (`tolerance`) where a difference is not within the tolerance; NaN is not."""
    if not found <= tolerance:
        raise UserError(
            f"tolerance: {what} differs from PyTorch by {found:.2e}, more than {tolerance:.0e}; the file was not kept. "
            "Raise tolerance if that is small enough for you"
        )
