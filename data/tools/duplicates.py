"""Near-duplicates: images that are the same but for size, compression and mirroring, by a perceptual hash.

    hashes = np.array([perceptual_hash(pixels) for pixels in images])     int64 [N]
    groups = group_duplicates(hashes)                                     int64 [N], equal within a group

A hash has one bit for the sign of each of the 8 x 8 lowest frequencies (DCT-II) of the grey levels at 32 x 32, without
the mean: 63 bits. A mirror changes the sign of the odd horizontal frequencies, so the mirror image's hash follows from
the hash.
Source: pHash (Zauner 2010) and imagehash. Differs: they compare with the median, so the mirror image's hash would not
follow.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

_SIDE_PX, _FREQUENCIES = 32, 8
_DISTANCE = 4  # bits in which the hashes of duplicates may differ
# Hashes at most 4 bits apart agree in one of these 5 bands of 13 bits (the last has 11).
_SHIFTS, _BAND = range(0, 63, 13), 2**13 - 1
_WAVES = np.cos(np.pi / _SIDE_PX * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE_PX) + 0.5))
_PLACES = np.arange(-1, _FREQUENCIES**2 - 1).reshape(_FREQUENCIES, _FREQUENCIES)  # of the bits; the mean's is -1
_ODD = sum(1 << int(place) for place in _PLACES[:, 1::2].flat)


def perceptual_hash(pixels: np.ndarray) -> int:
    """Return the hash of an image, uint8 [H, W, 3], or of its grey levels [H, W]: from 0 to 2**63 - 1."""
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.HAMMING)
    signs = _WAVES @ np.asarray(grey, np.float64) @ _WAVES.T > 0.5  # not 0, where rounding would decide
    return sum(1 << int(place) for place in _PLACES[signs] if place >= 0)


def group_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return the group of each hash, int64 [N]: the smallest hash of those that a chain of near ones joins to it.

    Near are two of which one, or its mirror image's, differs from the other in at most 4 bits.
    """
    distinct, places = np.unique(hashes, return_inverse=True)
    parents = np.arange(len(distinct))
    for first, second in _near_pairs(distinct):
        while len(first):
            roots = _roots(parents, first), _roots(parents, second)
            parents[first], parents[second] = roots  # shortens the ways to them
            differ = roots[0] != roots[1]
            first, second = roots[0][differ], roots[1][differ]
            np.minimum.at(parents, np.maximum(first, second), np.minimum(first, second))  # the smaller root stays
    return distinct[_roots(parents, np.arange(len(distinct)))][places]


def _near_pairs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all near pairs as indices, [n] and [n]; for each band, those 1, 2, 3, ... places apart in its order."""
    both = np.concatenate([hashes, hashes ^ _ODD])
    for shift in _SHIFTS:
        order = np.argsort(both >> shift & _BAND, kind="stable")
        values, owners = both[order], order % len(hashes)
        bands = values >> shift & _BAND
        ends, rows, apart = np.searchsorted(bands, bands, side="right"), np.arange(len(both)), 0
        while len(rows):
            apart += 1
            rows = rows[rows + apart < ends[rows]]
            differences = values[rows] ^ values[rows + apart]
            for _ in range(_DISTANCE):
                differences &= differences - 1  # clears the lowest bit that is set
            near = rows[differences == 0]
            yield owners[near], owners[near + apart]


def _roots(parents: np.ndarray, items: np.ndarray) -> np.ndarray:
    while ((above := parents[items]) != items).any():
        items = above
    return items
