"""Near-duplicates: one picture in several sizes, formats, compressions or brightnesses, or mirrored.

    thumbnails = [draw_thumbnail(pixels) for pixels in images]     text of 384 letters each
    groups = group_duplicates(thumbnails)                          int64 [N], equal within a group

A thumbnail has the luma of 16 x 16 cells and the chroma of 4 x 4. Two pictures are alike if, whichever is mirrored,
the thumbnails, each in shares of its contrast, differ by less than a tenth; the mean brightness counts less, and so
does the contrast. So a copy may be a tenth brighter or darker, while form and colour distinguish pictures: flags, words
on one background, letters. A copy that is cropped by 1 % a side is usually recognised, by 3 % never.
Source: perceptual hashes (Zauner 2010, imagehash) and czkawka compare signs of grey frequencies. Differs: signs have
no colours, and in a drawing with few frequencies most signs are noise.
"""

import base64
from collections.abc import Sequence

import numpy as np
from numpy import ndarray
from PIL import Image

_LIMIT = 0.085  # copies are at 0.00 to 0.08, the flags of Romania and Chad at 0.10
_NOISE = 15.0  # levels, added to the contrast: JPEG changes a flat colour by as many
_OF_MEAN = np.float32([0.15, 1, 1])  # the weights of the mean luma and chroma
_OF_CONTRAST = 0.3  # the weight of the logarithm of the contrast
_COARSE = 0.07  # coarse forms of alike pictures are nearer
_NEIGHBOURS = 17  # pictures that a picture is compared with, itself included
_CHUNK = 2**11  # pictures at a time, whose levels fit into a cache
# A thumbnail's cells of luma, Cb and Cr, one after another; `_weigh` adds four numbers.
_CELLS = np.array([256, 16, 16], np.int16)
_OWNERS = np.repeat(np.eye(3, dtype=np.float32), _CELLS, axis=0)
_MIRROR = np.arange(292) ^ np.repeat([15, 3, 0], [256, 32, 4])  # rows have 16 or 4 cells


def draw_thumbnail(pixels: ndarray) -> str:
    """Return the thumbnail of an image, uint8 [H, W, 3], or of its grey levels [H, W], as text."""
    image = Image.fromarray(pixels).convert("RGB").resize((16, 16), Image.Resampling.HAMMING, reducing_gap=3.0)
    luma, *chroma = image.convert("YCbCr").split()
    bands = [luma, *(band.reduce(4) for band in chroma)]
    return base64.b64encode(b"".join(band.tobytes() for band in bands)).decode()


def read_thumbnails(texts: Sequence[str]) -> ndarray:
    """Return thumbnails as bytes, uint8 [N, 288]."""
    return np.frombuffer(base64.b64decode("".join(texts)), np.uint8).reshape(-1, len(_OWNERS))


def are_alike(first: ndarray, second: ndarray) -> ndarray:
    """Return which thumbnails of two arrays, uint8 [N, 288] each or one for all, show one picture, bool [N]."""
    return compare(first, second) < _LIMIT


def compare(first: ndarray, second: ndarray) -> ndarray:
    """Return the distances of thumbnails, whichever is mirrored, [N]; arrays as for `are_alike`."""
    ours = _weigh(first)
    theirs = _weigh(second)
    distances = [np.linalg.norm(ours - other, axis=1) for other in (theirs, theirs[:, _MIRROR])]
    return np.minimum(*distances)


def group_duplicates(thumbnails: Sequence[str]) -> ndarray:
    """Return the group of each thumbnail, int64 [N]: the index of the first thumbnail in a chain of alike thumbnails.

    Each thumbnail is compared with its nearest neighbours by their outlines.
    """
    from scipy.sparse import coo_array  # takes 0.2 s
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    pictures, owners = np.unique(read_thumbnails(thumbnails), axis=0, return_inverse=True)
    keys = np.concatenate([*map(_outline, _split(pictures))])
    _, near = KDTree(keys).query(keys, _NEIGHBOURS, distance_upper_bound=_COARSE, workers=-1)
    pairs = np.argwhere(near < len(keys))  # the others have no neighbour
    pairs[:, 1] = near[tuple(pairs.T)]
    pairs = pairs[np.concatenate([are_alike(*pictures[part.T]) for part in _split(pairs)])]
    graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(keys), len(keys)))
    groups = connected_components(graph, directed=False)[1][owners]
    return np.unique(groups, return_index=True)[1][groups]


def _split(array: ndarray) -> list[ndarray]:
    return np.array_split(array, len(array) // _CHUNK + 1)


def _weigh(pictures: ndarray) -> ndarray:
    """Return the compared features of pictures, float32 [N, 292]: form, mean brightness and colour, and contrast.

    Form and means are in shares of the contrast, so they do not change when all levels are multiplied.
    """
    means = pictures @ _OWNERS / _CELLS
    form = (pictures - means @ _OWNERS.T) / np.sqrt(_OWNERS @ _CELLS)
    contrast = np.linalg.norm(form, axis=1, keepdims=True) + _NOISE
    means -= np.float32([0, 128, 128])
    return np.concatenate([form / contrast, _OF_MEAN * means / contrast, _OF_CONTRAST * np.log(contrast)], axis=1)


def _outline(pictures: ndarray) -> ndarray:
    """Return a coarse form, [N, 20], which is nearly equal for alike pictures and their mirror images."""
    luma, _, rest = np.split(_weigh(pictures), (256, 288), axis=1)
    cells = luma.reshape(-1, 4, 4, 4, 4).sum((2, 4)) / 32**0.5
    left = cells[..., :2]
    right = cells[..., :1:-1]
    form = np.concatenate([left + right, abs(left - right)], axis=1).reshape(-1, 16)
    return np.concatenate([form, rest], axis=1)
