"""The map of a collection: where the images are, by what a network sees in them."""

import hashlib

import numpy as np

from utils.io.files import write_atomically
from utils.io.memo import OURS, own_cache

MOST = 10_000  # images on a map


def map_images(points: np.ndarray) -> np.ndarray:
    """Return the places of images on the map, float [N, 2], by t-SNE of their features; kept by these.

    points: features on their principal axes, float32 [N, C], the widest axis last. Few images are shown by two axes.
    """
    if len(points) <= 60:  # t-SNE looks at as many neighbours
        return points[:, -2:]
    file = own_cache(OURS / "maps") / hashlib.sha256(points).hexdigest()
    if not file.exists():
        from openTSNE import TSNE

        tsne = TSNE(perplexity=20, early_exaggeration_iter=100, n_iter=200, random_state=0)
        write_atomically(file, tsne.fit(points[:, -50:]).tofile)
    return np.fromfile(file).reshape(-1, 2)
