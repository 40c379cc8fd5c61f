"""Near-duplicates: one picture in several sizes, formats, compressions or brightnesses, or mirrored.

    thumbnails = [draw_thumbnail(pixels) for pixels in images]     text of 384 letters each
    groups = group_duplicates(thumbnails)                          int64 [N], equal within a group

A thumbnail has the luma of 16 x 16 cells and the two chromas of 4 x 4. Two pictures are alike if, at equal contrast and
whichever is mirrored, the thumbnails differ by less than a tenth of the contrast. So form and colour both tell pictures
apart: flags, words on one background, letters. Of a copy that is cropped, 1 % a side is usually found, 3 % never.
Source: perceptual hashes (Zauner 2010, imagehash) and czkawka compare signs of grey frequencies. Differs: those cannot
tell colours, and in a drawing with few frequencies most signs are noise.
"""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

_LUMA_PX = 16
_CHROMA_PX = 4
_BYTES = _LUMA_PX**2 + 2 * _CHROMA_PX**2
_TEXT = 4 * _BYTES // 3  # letters of base64
_LIMIT = 0.085  # copies are at 0.00 to 0.08, the flags of Romania and Chad at 0.10
_NOISE = 15.0  # levels, added to the contrast: JPEG changes a flat colour so
_OF_MEAN = 0.15  # weights of a difference in brightness and contrast
_OF_CONTRAST = 0.3
_COARSE = 0.05  # coarse forms of alike pictures are nearer
_NEIGHBOURS = 16  # that each picture is compared with
_CHUNK = 2**14


class _Pictures(NamedTuple):
    """Thumbnails as numbers: luma [N, 16, 16] at mean 0 and contrast 1, chroma [N, 2, 4, 4] in levels, and [N] each."""

    luma: np.ndarray
    chroma: np.ndarray
    mean: np.ndarray
    contrast: np.ndarray


def draw_thumbnail(pixels: np.ndarray) -> str:
    """Return the thumbnail of an image, uint8 [H, W, 3], or of its grey levels [H, W], as text."""
    size = (_LUMA_PX, _LUMA_PX)
    image = Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling.HAMMING, reducing_gap=3.0)
    luma, *chroma = image.convert("YCbCr").split()
    small = [band.resize((_CHROMA_PX, _CHROMA_PX), Image.Resampling.BOX) for band in chroma]
    return base64.b64encode(b"".join(band.tobytes() for band in (luma, *small))).decode()


def read_thumbnails(texts: Sequence[str]) -> np.ndarray:
    """Return thumbnails as bytes, uint8 [N, 288]."""
    return np.frombuffer(base64.b64decode("".join(texts)), np.uint8).reshape(-1, _BYTES)


def are_alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return which pairs of thumbnails, uint8 [N, 288] each, show one picture, bool [N]."""
    ours = _normalise(first)
    theirs = _normalise(second)
    contrast = (ours.contrast + theirs.contrast) / 2
    levels = _OF_MEAN * (ours.mean - theirs.mean), _OF_CONTRAST * (ours.contrast - theirs.contrast)
    common = np.square(levels).sum(0)

    def differ(luma: np.ndarray, chroma: np.ndarray) -> np.ndarray:
        colour = np.square(ours.chroma - chroma).sum(1).mean((1, 2)) + common
        return np.square(ours.luma - luma).mean((1, 2)) + colour / contrast**2

    mirrored = differ(theirs.luma[..., ::-1], theirs.chroma[..., ::-1])
    return np.minimum(differ(theirs.luma, theirs.chroma), mirrored) < _LIMIT**2


def group_duplicates(thumbnails: Sequence[str]) -> np.ndarray:
    """Return the group of each thumbnail, int64 [N]: the index of the first one that a chain of alike ones joins it to.

    Each is compared with its nearest ones by the coarsest form and the mean colour, as mirrored images have it too.
    """
    from scipy.sparse import coo_array  # takes 0.2 s
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    distinct, first, owners = np.unique(thumbnails, return_index=True, return_inverse=True)
    pictures = read_thumbnails(distinct)
    keys = np.concatenate([np.empty((0, 19), np.float32), *map(_outline, _split(pictures))])
    near = np.stack([np.arange(len(keys))] * 2)
    if len(keys) > 1:
        _, found = KDTree(keys).query(keys, range(2, _NEIGHBOURS + 2), distance_upper_bound=_COARSE, workers=-1)
        near = np.stack([np.repeat(near[0], _NEIGHBOURS), found.ravel()])
        near = near[:, near[1] < len(keys)]  # the others have no neighbour
    chunks = (slice(start, start + _CHUNK) for start in range(0, near.shape[1], _CHUNK))
    alike = [are_alike(pictures[near[0, part]], pictures[near[1, part]]) for part in chunks]
    pairs = near[:, np.concatenate([np.empty(0, bool), *alike])]
    graph = coo_array((np.ones(pairs.shape[1], bool), pairs), shape=(len(keys), len(keys)))
    _, components = connected_components(graph, directed=False)
    least = np.full(len(keys), len(thumbnails))
    np.minimum.at(least, components, first)
    return least[components][owners]


def _split(pictures: np.ndarray) -> list[np.ndarray]:
    return [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]


def _normalise(pictures: np.ndarray) -> _Pictures:
    luma = pictures[:, : _LUMA_PX**2].astype(np.float32)
    mean = luma.mean(1)
    chroma = pictures[:, _LUMA_PX**2 :].reshape(-1, 2, _CHROMA_PX, _CHROMA_PX).astype(np.float32)
    contrast = np.sqrt(luma.var(1) + chroma.var((2, 3)).sum(1)) + _NOISE
    luma = (luma - mean[:, None]) / contrast[:, None]
    return _Pictures(luma.reshape(-1, _LUMA_PX, _LUMA_PX), chroma, mean, contrast)


def _outline(pictures: np.ndarray) -> np.ndarray:
    """Return the coarse form and colour of pictures and of their mirror images, [N, 19]; alike ones are near."""
    found = _normalise(pictures)
    cells = found.luma.reshape(-1, 4, _LUMA_PX // 4, 4, _LUMA_PX // 4).mean((2, 4)) / 4
    left = cells[..., :2]
    right = cells[..., :1:-1]
    form = np.concatenate([left + right, abs(left - right)], axis=1) / np.sqrt(2)
    colour = np.concatenate([found.chroma.mean((2, 3)), found.mean[:, None] * _OF_MEAN], axis=1)
    return np.concatenate([form.reshape(len(form), -1), colour / 128], axis=1)
