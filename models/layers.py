"""The layers of ConvNeXt V2: GRN, layer norm over channels, stochastic depth, visible sites, and patches."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of GRN


class _Gather(torch.autograd.Function):
    """Select the rows at `indices`, which has no repeats.

    The gradient of `index_select` in torch accumulates, slowly and on GPUs in any order.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.size = rows.shape[0]
        return rows.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, indices, grad), None


@dataclass(frozen=True)
class Sites:
    """The positions of one stage's tokens in the dense map: row numbers, int64 [B * V * r * r]."""

    indices: Tensor
    batch: int
    height: int
    width: int

    def to_map(self, tokens: Tensor) -> Tensor:
        """Copy tokens [B, V, r, r, C] to a map of zeros [B, C, H, W] (channels_last in memory)."""
        channels = tokens.shape[-1]
        rows = tokens.new_zeros(self.batch * self.height * self.width, channels)
        return (
            rows.index_copy_(0, self.indices, tokens.reshape(-1, channels))
            .view(self.batch, self.height, self.width, channels)
            .permute(0, 3, 1, 2)
        )

    def from_map(self, x: Tensor) -> Tensor:
        """Gather a map [B, C, H, W] at these sites: rows [B * V * r * r, C]."""
        return _Gather.apply(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), self.indices)


class _Response(torch.autograd.Function):
    """y = x + s * x + beta with s = gamma * share, and its gradient in a few passes over the sites.

    autograd needs twelve passes for the same formula and keeps two more maps. On a CPU, torch's vector_norm over sites
    takes twice as long as squares and a sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y, norms, share = respond(x, gamma, beta)
        ctx.save_for_backward(x, gamma, norms, share)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gamma, norms, share = ctx.saved_tensors
        wide = norms.dtype
        by_beta = grad.sum(dim=(0, 1, 2), keepdim=True, dtype=wide)
        product = grad.to(wide) * x if x.dtype == torch.float16 else grad * x  # fp16 would overflow
        meeting = product.sum(dim=(1, 2), keepdim=True, dtype=wide)  # [B, 1, 1, C]
        by_gamma = (share * meeting).sum(dim=0, keepdim=True)
        by_share = gamma * meeting
        mean = norms.mean(dim=-1, keepdim=True) + EPS
        by_norm = by_share / mean - (by_share * norms).mean(dim=-1, keepdim=True) / mean.square()
        # The gradient of the norm is x / norm, or 0 if the norm is 0.
        factor = torch.where(norms > 0, by_norm / norms, 0.0)
        scale = gamma * share
        if x.dtype == torch.float16:  # the factor overflows for a channel that is almost 0
            by_x = torch.addcmul(grad * (1.0 + scale), x.to(wide), factor).to(x.dtype)
        else:
            by_x = torch.addcmul(torch.addcmul(grad, grad, scale.to(grad.dtype)), x, factor.to(x.dtype))
        return by_x, by_gamma.to(gamma.dtype), by_beta.to(gamma.dtype).view_as(gamma)


def respond(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GRN's output [B, H, W, C] in the dtype of `x`, and in a wider dtype the norms and their shares."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and not torch.compiler.is_compiling():
        norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)  # no wide copy of x
    else:
        squares = x.square() if x.dtype == wide else x.to(wide).square_()
        total = squares.sum(dim=(1, 2), keepdim=True)  # [B, 1, 1, C]
        # The root's gradient at 0 is infinite; selecting before and after the root avoids it (compiled graphs).
        norms = torch.where(total == 0, 0.0, torch.where(total == 0, 1.0, total).sqrt())
    share = norms / (norms.mean(dim=-1, keepdim=True) + EPS)
    # As a sum, because bf16 would round the factor 1 + gamma * share at the scale of 1.
    return x + torch.addcmul(beta.to(x.dtype), x, (gamma * share).to(x.dtype)), norms, share


class GRN(nn.Module):
    """Scale every channel by its share of the sample's response (global response normalisation).

    With g[c] the L2 norm of channel c over the sites of one sample: y = x + gamma * x * g / (mean(g) + EPS) + beta.
    gamma and beta start at 0, so the layer starts as the identity.

    Source: Woo et al. 2023 (arXiv 2301.00808), section 4 and algorithm 1.
    Differs: the denominator is the mean over channels, as in the published code, not the sum of equation 2.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, num_channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, H, W, C] in the dtype of `x`.

        The norm is computed in float32 or wider, even under autocast. Its gradient at norm 0 is 0.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the compiler fuses the passes itself
            return _Response.apply(x, self.gamma, self.beta)
        return respond(x, self.gamma, self.beta)[0]


class LayerNorm(nn.LayerNorm):
    """Normalise over the last dimension, on a GPU without a float32 copy of the map.

    There autocast would write the input, the output and both gradients in float32, and copy each to bfloat16 again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., C]: on a GPU in the dtype of `x`, computed in float32 with weights rounded to that dtype."""
        if not x.is_cuda or x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ChannelsFirstLayerNorm(LayerNorm):
    """Normalise [B, C, H, W] over its channels, separately at each site."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W]. In the channels_last memory format, the permutations move no data."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Add a residual branch; in training, drop that of a sample with probability `rate`, and scale the others up.

    It draws from the global generator of the input's device, which the training step seeds. One pass over the map, and
    one in the backward pass, where a drop before the sum takes three and two.

    Source: Huang et al. 2016 (arXiv 1603.09382), with the scaling moved to training.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return [B, ...], with the same expectation as `x + branch`, which it is in evaluation or at rate 0."""
        if not self.training or self.rate == 0:
            return x + branch
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return torch.addcmul(x, branch, keep.to(branch.dtype), value=1 / (1 - self.rate))


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, L, P] in row-major order; P is (row, column, channel)."""
    cells = F.pixel_unshuffle(images, patch_px).unflatten(1, (images.shape[1], -1))  # [B, C, row and column, h, w]
    return cells.flatten(3).transpose(1, 3).flatten(2)


def unpatchify(patches: Tensor, patch_px: int, image_size_hw: tuple[int, int]) -> Tensor:
    """Join patches [B, L, P] to images [B, C, H, W], the inverse of `patchify`."""
    cells = patches.unflatten(2, (patch_px**2, -1)).transpose(1, 3).flatten(1, 2)  # [B, C times row and column, L]
    return F.pixel_shuffle(cells.unflatten(2, [side // patch_px for side in image_size_hw]), patch_px)
