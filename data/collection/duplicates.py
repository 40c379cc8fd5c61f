"""Near-duplicates: one picture in several sizes, formats, compressions or brightnesses, or mirrored.

    thumbnails = [draw_thumbnail(pixels) for pixels in images]     text of 1,024 letters each
    groups = group_duplicates(thumbnails)                          int64 [N], equal within a group

A thumbnail has the luma of 16 x 16 cells and the chroma of 4 x 4. Two pictures are alike if, whichever is mirrored,
the thumbnails differ by less than a tenth of their contrast; a difference of the mean brightness counts less. So form
and colour tell pictures apart: flags, words on one background, letters. Of a copy that is cropped, 1 % a side is
usually found, 3 % never.
Source: perceptual hashes (Zauner 2010, imagehash) and czkawka compare signs of grey frequencies. Differs: those cannot
tell colours, and in a drawing with few frequencies most signs are noise.
"""

import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image

_SIDE_PX = 16
_LIMIT = 0.085  # copies are at 0.00 to 0.08, the flags of Romania and Chad at 0.10
_NOISE = 15.0  # levels, added to the contrast: JPEG changes a flat colour so
_OF_MEAN = 0.15  # the weight of a difference in brightness
_COARSE = 5.0  # levels; coarse forms of alike pictures are nearer
_NEIGHBOURS = 17  # that each picture is compared with, itself included
_CHUNK = 2**11  # pictures at a time, whose levels fit into a cache


def draw_thumbnail(pixels: np.ndarray) -> str:
    """Return the thumbnail of an image, uint8 [H, W, 3], or of its grey levels [H, W], as text."""
    size = (_SIDE_PX, _SIDE_PX)
    image = Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling.HAMMING, reducing_gap=3.0)
    fine = image.convert("YCbCr")
    coarse = fine.reduce(4).resize(size, Image.Resampling.NEAREST)
    bands = [fine.getchannel(0), *coarse.split()[1:]]
    return base64.b64encode(Image.merge("YCbCr", bands).tobytes()).decode()


def read_thumbnails(texts: Sequence[str]) -> np.ndarray:
    """Return thumbnails as bytes, uint8 [N, 16, 16, 3]."""
    return np.frombuffer(base64.b64decode("".join(texts)), np.uint8).reshape(-1, _SIDE_PX, _SIDE_PX, 3)


def are_alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return which thumbnails of two arrays, uint8 [N, 16, 16, 3] each or one for all, show one picture, bool [N]."""
    ours = _weigh(first)
    theirs = _weigh(second)
    contrast = (_contrast(ours) + _contrast(theirs)) / 2
    squares = [_mean_square(ours - other) for other in (theirs, theirs[:, :, ::-1])]
    return np.minimum(*squares) < np.square(_LIMIT * contrast)


def group_duplicates(thumbnails: Sequence[str]) -> np.ndarray:
    """Return the group of each thumbnail, int64 [N]: the index of the first one that a chain of alike ones joins it to.

    Each is compared with its nearest ones by their coarse forms.
    """
    from scipy.sparse import coo_array  # takes 0.2 s
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    numbers = {text: number for number, text in enumerate(dict.fromkeys(thumbnails))}
    owners = [*map(numbers.get, thumbnails)]
    pictures = read_thumbnails([*numbers])
    keys = np.concatenate([*map(_outline, _split(pictures))])
    _, near = KDTree(keys).query(keys, _NEIGHBOURS, distance_upper_bound=_COARSE, workers=-1)
    pairs = np.argwhere(near < len(keys))  # the others have no neighbour
    pairs[:, 1] = near[tuple(pairs.T)]
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)  # many are each other's neighbours
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    pairs = pairs[np.concatenate([are_alike(*pictures[part.T]) for part in _split(pairs)])]
    graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(keys), len(keys)))
    groups = connected_components(graph, directed=False)[1][owners]
    return np.unique(groups, return_index=True)[1][groups]


def _split(array: np.ndarray) -> list[np.ndarray]:
    return np.array_split(array, len(array) // _CHUNK + 1)


def _mean_square(levels: np.ndarray) -> np.ndarray:
    """Return the mean over the cells of the squares of levels, [N]."""
    return np.einsum("nijk,nijk->n", levels, levels) / _SIDE_PX**2


def _contrast(levels: np.ndarray) -> np.ndarray:
    """Return the contrast of pictures in levels, [N]."""
    return np.sqrt(_mean_square(levels - levels.mean((1, 2), keepdims=True))) + _NOISE


def _weigh(pictures: np.ndarray) -> np.ndarray:
    """Return the levels of pictures, float32 [N, 16, 16, 3], without most of their brightness."""
    levels = pictures.astype(np.float32)
    levels[..., 0] -= (1 - _OF_MEAN) * levels[..., 0].mean((1, 2), keepdims=True)
    return levels


def _outline(pictures: np.ndarray) -> np.ndarray:
    """Return the coarse form of pictures and of their mirror images, [N, 16]; alike ones differ by a few levels."""
    cells = _weigh(pictures).sum(3).reshape(-1, 4, 4, 4, 4).mean((2, 4))
    left = cells[..., :2]
    right = cells[..., :1:-1]
    return np.concatenate([left + right, abs(left - right)], axis=1).reshape(-1, 16) / 32**0.5
