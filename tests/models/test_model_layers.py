"""The layers. Reference equality (GRN, layer norm), properties (mask, drop path), gradients at blank inputs, dtypes."""

import pytest
import torch
from torch import nn

from models.layers import GRN, DropPath
from tests.models.outcome import outcome


def random_grn(channels, dtype=torch.float64):
    grn = GRN(channels).to(dtype)
    nn.init.normal_(grn.gamma)
    nn.init.normal_(grn.beta)
    return grn


def test_grn_and_its_gradients_are_those_of_the_formula():
    """The gradient is written by hand (models/layers.py)."""
    torch.manual_seed(0)
    grn, x = random_grn(6), torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    norms = x.square().sum((1, 2), keepdim=True).sqrt()
    expected = grn.gamma * x * norms / (norms.mean(3, keepdim=True) + 1e-6) + grn.beta + x
    torch.testing.assert_close(grn(x), expected, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(y.sin().sum(), (x, grn.gamma, grn.beta)) for y in (grn(x), expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_a_compiled_grn_is_the_eager_one_where_a_norm_is_zero_too():
    """A compiler differentiates the formula itself."""
    torch.manual_seed(0)
    grn, x = random_grn(8, torch.float32), torch.randn(2, 5, 4, 8)
    x[..., 2] = 0.0
    eager, found = outcome(grn, x), outcome(torch.compile(grn, backend="aot_eager", fullgraph=True), x)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grn_reduces_in_float32(dtype):
    """In fp16 the sum of squares, 4096 * 64^2, would be infinite; in bf16 a sum of ones would stop at 256."""
    torch.manual_seed(0)
    grn = random_grn(4, torch.float32)
    x = torch.full((1, 64, 64, 4), 64.0, dtype=dtype, requires_grad=True)
    y = grn(x)
    expected = 64 * (1 + grn.gamma) + grn.beta  # all norms are equal, so every share is 1
    assert y.dtype == dtype
    torch.testing.assert_close(y[:, :1, :1].float(), expected, rtol=1e-2, atol=0.3)
    y.float().mean().backward()
    assert x.grad.isfinite().all() and grn.gamma.grad.dtype == torch.float32


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop, x, branch = DropPath(0.3).train(), torch.full((20_000, 2, 3), 2.0), torch.ones(20_000, 2, 3)
    y = drop(x, branch) - x
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (y == y[:, :1, :1]).all()
    assert abs(y.mean().item() - 1) < 0.02  # five standard deviations are 0.023
