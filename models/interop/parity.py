"""Compare a network with its exported file in another tool.

With small weights, logits hardly vary between images, so a wrong converter could pass. Every conversion is therefore
first tried on a copy with varied weights: scales of norms near 1, GRN far from the identity.
"""

import copy

import torch
from torch import nn

from utils.errors import UserError


@torch.no_grad()
def vary_weights(network: nn.Module) -> nn.Module:
    """Return a copy of a network, in eval mode, with random weights that make its outputs vary between images."""
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


def refuse_difference(difference: float, tolerance: float, what: str) -> None:
    """Raise UserError (`tolerance`) if a difference is above the tolerance or NaN."""
    if not difference <= tolerance:
        raise UserError(
            f"tolerance: {what} differs from PyTorch by {difference:.2e}, more than {tolerance:.0e}; the file was not "
            "kept. Raise tolerance if that is small enough for you"
        )
