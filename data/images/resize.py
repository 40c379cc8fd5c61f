"""Resize images of bytes, in torch or in NumPy: both give the same bits, and a small job does not pay torch's import.

Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp of pytorch/pytorch, antialias of uint8: along x, then along y, each
with whole weights, and rounded to bytes.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from torch import Tensor

_SMALL_JOB = 10**8  # bytes of images that a process resizes in NumPy, in about a second, before it imports torch
_MOST_WEIGHT = 2**15
_MOST_BITS = 22
_done = [0]  # bytes that NumPy has resized


def resize(pixels: ndarray, size_hw: Sequence[int], interpolation: str) -> ndarray:
    """Resize an image, uint8 [H, W, C], with antialias; interpolation: bilinear or bicubic."""
    height, width = size_hw
    if (height, width) == pixels.shape[:2]:
        return pixels
    if "torch" not in sys.modules and _done[0] < _SMALL_JOB:
        _done[0] += pixels.size
        wide = _resize_rows(pixels.swapaxes(0, 1), width, interpolation)
        return _resize_rows(wide.swapaxes(0, 1), height, interpolation)
    import torch
    from torch.nn import functional as F

    # For channels-last memory without gaps, torch's kernel is fastest; `pixels[None]` would have another first stride.
    batch = torch.from_numpy(np.ascontiguousarray(pixels).reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def on_pixels(image: "Tensor", change: Callable[..., ndarray], *settings: Any) -> "Tensor":
    """Return an image, uint8 [C, H, W], after a change of its pixels, uint8 [H, W, C]."""
    import torch

    return torch.from_numpy(change(image.permute(1, 2, 0).numpy(), *settings)).permute(2, 0, 1)


def _resize_rows(pixels: ndarray, count: int, interpolation: str) -> ndarray:
    """Return another number of rows of [N, ...]."""
    weights, bits = _whole_weights(len(pixels), count, interpolation)
    sums = weights @ pixels.reshape(len(pixels), -1).astype(np.int32)
    levels = (sums + (1 << bits - 1) >> bits).clip(0, 255)
    return levels.astype(np.uint8).reshape(count, *pixels.shape[1:])


@functools.lru_cache
def _whole_weights(size: int, count: int, interpolation: str) -> tuple[csr_array, int]:
    """Return the share of each pixel of a line in each resized pixel, int32 [count, size], and their bits."""
    scale = size / count
    centres = scale * (np.arange(count) + 0.5)
    shares = _curve(np.abs(np.arange(size) - centres[:, None] + 0.5) * (1 / max(scale, 1.0)), interpolation)
    shares /= shares.sum(axis=1, keepdims=True)
    bits = sum(int(0.5 + shares.max() * 2**bits) < _MOST_WEIGHT for bits in range(1, _MOST_BITS + 1))
    return csr_array(np.trunc(shares * 2**bits + np.copysign(0.5, shares)).astype(np.int32)), bits


def _curve(x: ndarray, interpolation: str) -> ndarray:
    """Return the weight at a distance of at least 0 from the centre, not scaled."""
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
