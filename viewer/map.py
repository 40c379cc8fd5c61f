"""Where the images of a collection are on a map, and which are most like a picture, by what a network sees in them."""

import hashlib
from collections.abc import Callable

import numpy as np

from data.collection.collection import Collection
from data.config import DataConfig
from utils.io.files import write_atomically
from utils.io.memo import OURS, own_cache
from viewer.networks import prepare_image

MOST = 10_000  # images on a map
_NEAREST = 48  # images


def find_like(
    collection: Collection, config: DataConfig, picture: tuple[bytes, str], tell: Callable[[float], None]
) -> tuple[np.ndarray, str]:
    """Return the rows of the images most like a picture, the most similar first, and a line about the network.

    picture: encoded, and its name. tell: called with the share of new images that is read; features are kept by the
    state of each image's file. Raises UnreadableImage, UserError (`data.root`).
    """
    import torch

    from engine.frozen.choose import choose_cpu, choose_frozen
    from engine.frozen.features import read_features
    from engine.measures.neighbours import find_nearest

    runtime = choose_cpu()
    frozen = choose_frozen(None, collection, runtime, "data.root")
    image = torch.from_numpy(prepare_image(frozen.predictor, *picture))
    every = np.arange(len(collection))
    features, rows = read_features(frozen, collection, config, every, runtime, tell=tell)
    _, best = find_nearest(torch.from_numpy(frozen.predictor.embed(image)), features, min(_NEAREST, len(rows)))
    return rows[best[0]], frozen.says


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
