"""The depthwise convolution. Reference equality with torch's, forward and backward, in float64 and under autocast."""

import pytest
import torch
from torch import nn

from models.depthwise import DepthwiseConv2d, depthwise_weight_grad
from tests.models.outcome import outcome


def pair(dim, dtype=torch.float64):
    """Ours and torch's with the same weights."""
    torch.manual_seed(0)
    ours = DepthwiseConv2d(dim).to(dtype)
    theirs = nn.Conv2d(dim, dim, 7, padding=3, groups=dim).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("shape", [(3, 2, 1, 1), (2, 4, 17, 33), (1, 2, 50, 16)])
def test_gradients_equal_torch(shape):
    ours, theirs = pair(shape[1])
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(outcome(ours, x, grad), outcome(theirs, x, grad), rtol=1e-11, atol=1e-11)


def test_weight_gradient_of_bf16_is_summed_in_float32():
    torch.manual_seed(0)
    x, grad = torch.randn(64, 8, 8, 8), torch.randn(64, 8, 8, 8)
    exact = depthwise_weight_grad(x.bfloat16().double(), grad.bfloat16().double(), 7)
    found = depthwise_weight_grad(x.bfloat16(), grad.bfloat16(), 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-3 * exact.abs().max().item())


def test_autocast_and_frozen_parts():
    ours, theirs = pair(4, dtype=torch.float32)
    ours.bias.requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        (output, _, found, bias), (_, _, wanted, _) = outcome(ours, x), outcome(theirs, x)
    assert output.dtype == torch.bfloat16 and found.dtype == torch.float32 and bias is None
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * wanted.abs().max().item())
