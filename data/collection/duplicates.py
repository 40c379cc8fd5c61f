"""Near-duplicates: images that only differ in size, compression or mirroring, found by a perceptual hash.

    hashes = np.array([perceptual_hash(pixels) for pixels in images])     int64 [N]
    groups = group_duplicates(hashes)                                     int64 [N], equal within a group

A hash has 63 bits, the signs of the 8 x 8 lowest frequencies (DCT-II) of the grey levels at 32 x 32, without the mean.
A mirror image has opposite signs at odd horizontal frequencies, so its hash can be computed from the hash.
Source: pHash (Zauner 2010) and imagehash. Differs: they compare with the median, which does not allow this.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

_SIDE_PX = 32
_FREQUENCIES = 8
_DISTANCE = 4  # maximum number of different bits between duplicates
# Hashes at most 4 bits apart agree in one of these 5 bands of 13 bits (the last has 11).
_SHIFTS = range(0, 63, 13)
_BAND = 2**13 - 1
_WAVES = np.cos(np.pi / _SIDE_PX * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE_PX) + 0.5))
_BITS = np.arange(-1, _FREQUENCIES**2 - 1).reshape(_FREQUENCIES, _FREQUENCIES)  # bit numbers; -1 for the mean
_ODD = sum(1 << int(bit) for bit in _BITS[:, 1::2].flat)


def perceptual_hash(pixels: np.ndarray) -> int:
    """Return the hash of an image, uint8 [H, W, 3], or of its grey levels [H, W]: from 0 to 2**63 - 1."""
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.HAMMING)
    signs = _WAVES @ np.asarray(grey, np.float64) @ _WAVES.T > 0.5  # above 0, where rounding would decide
    return sum(1 << int(bit) for bit in _BITS[signs] if bit >= 0)


def group_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return the group of each hash, int64 [N]: the smallest hash in its connected component of near pairs.

    Two hashes are near if they, or one and the mirror image of the other, differ in at most 4 bits.
    """
    from scipy.sparse import coo_array  # takes 0.2 s
    from scipy.sparse.csgraph import connected_components

    distinct, inverse = np.unique(hashes, return_inverse=True)
    pairs = np.concatenate([np.empty((2, 0), np.int64), *map(np.stack, _near_pairs(distinct))], axis=1)
    graph = coo_array((np.ones(pairs.shape[1], bool), pairs), shape=(len(distinct), len(distinct)))
    _, components = connected_components(graph, directed=False)
    _, smallest = np.unique(components, return_index=True)
    return distinct[smallest[components]][inverse]


def _near_pairs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all near pairs as two index arrays [n], for each band at distances 1, 2, 3, ... in sorted order."""
    both = np.concatenate([hashes, hashes ^ _ODD])
    for shift in _SHIFTS:
        order = np.argsort(both >> shift & _BAND, kind="stable")
        values = both[order]
        owners = order % len(hashes)
        bands = values >> shift & _BAND
        ends = np.searchsorted(bands, bands, side="right")
        rows = np.arange(len(both))
        apart = 0
        while len(rows):
            apart += 1
            rows = rows[rows + apart < ends[rows]]
            differences = values[rows] ^ values[rows + apart]
            for _ in range(_DISTANCE):
                differences &= differences - 1  # clears the lowest set bit
            near = rows[differences == 0]
            yield owners[near], owners[near + apart]
