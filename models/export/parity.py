"""Compare a network with what another tool makes of its file.

Logits of a network with small weights hardly vary between images, so that a wrong converter would pass. Every
conversion is therefore tried first on a copy with varied weights: scales of norms near 1, GRN far from the identity.
"""

import copy

import torch
from torch import nn

from utils.errors import UserError


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


def refuse_difference(found: float, tolerance: float, what: str) -> None:
    """Raise UserError (`tolerance`) where a difference is not within the tolerance; NaN is not."""
    if not found <= tolerance:
        raise UserError(
            f"tolerance: {what} differs from PyTorch by {found:.2e}, more than {tolerance:.0e}; the file was not kept. "
            "Raise tolerance if that is small enough for you"
        )
