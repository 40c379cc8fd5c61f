"""Features of images by a frozen network, stored by weights and image.

features, rows = read_features(frozen, collection, config.data, rows, runtime)
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.collection.collection import Collection
from data.config import DataConfig
from data.images.bytes import Files, open_contents
from data.images.disk_cache import image_key
from data.images.record_store import Store, record_key
from data.open import Data, open_images
from data.stream.loader import no_fields
from data.stream.order import evaluation_batches
from engine.update.runtime import Runtime
from models.predictor import Predictor
from utils.errors import UserError
from utils.io.files import ignore_write_errors
from utils.io.memo import OURS
from utils.ranks.signals import check_stop
from utils.record.progress import track

FOLDER = OURS / "features"
_BATCH = 32


class Frozen(NamedTuple):
    """A network that gives features. version: of the weights; says: its name and its training data, for a line."""

    predictor: Predictor
    version: str
    says: str


_SMALL = {
    "image_size_hw": [16, 16], "eval_resize": "squash", "eval_crop": 1.0, "interpolation": "bilinear",
    "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3,
}  # fmt: skip
# Small networks that train here, each on half of the images, find wrong labels hardly better (docs/wrong_labels.md).
PIXELS = Frozen(
    Predictor(
        {"output": "features", "preprocessing": _SMALL},
        lambda images, what: (images.flatten(1).cpu() / 127.5 - 1).numpy(),
    ),
    "pixels",
    "the images at 16 px, because this machine has no trained network and cannot fetch one",
)


class FeatureStore:
    """Features of the images of a collection or of a list of files: records by weights and file state."""

    def __init__(self, contents: Files, frozen: Frozen, precision: str = "fp32") -> None:
        self._contents = contents
        self._store = Store(FOLDER)
        self._inputs = record_key(frozen.version, frozen.predictor.preprocessing, precision)
        self._writes = True  # until the disk refuses

    def key(self, row: int) -> str | None:
        """Return the key of a row's record; None if it cannot be stored. Call it before the image is read."""
        return image_key(self._contents, row, self._inputs)

    def get(self, key: str | None) -> np.ndarray | None:
        """Return features float32 [D], or None."""
        content = None if key is None else self._store.get(key)
        return None if content is None else content.view(np.float32)

    def put(self, key: str | None, features: np.ndarray) -> None:
        """Store features float32 [D]. After a failure, warn and store no more."""
        if key is None or not self._writes:
            return
        self._writes = False
        with ignore_write_errors(FOLDER):
            self._store.put(key, features.tobytes())
            self._writes = True


def read_features(
    frozen: Frozen,
    collection: Collection,
    config: DataConfig,
    rows: np.ndarray,
    runtime: Runtime,
    deadline: float = math.inf,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[Tensor, np.ndarray]:
    """Return features float32 [N, D] of the rows whose image can be read, and these rows [N], in order.

    Only new and changed images are read, by this process alone. deadline: on the monotonic clock; later rows are
    skipped. tell: called with the share of the images that is read. Raises UserError (`data.root`) if no image can be
    read.
    """
    store = FeatureStore(open_contents(collection), frozen, runtime.precision)
    keys = [store.key(row) for row in rows.tolist()]
    features = dict(enumerate(map(store.get, keys)))
    missing = np.array([place for place, vector in features.items() if vector is None], dtype=np.int64)
    if len(missing):
        predictor = frozen.predictor
        source = open_images(collection, config, predictor.preprocessing)
        data = Data(collection, source, runtime, seed=0, batch_size=_BATCH, run_path=None)
        loader = data.prepared(rows[missing], no_fields, predictor.preprocessing).loader
        batches = loader.load(evaluation_batches(rows[missing], _BATCH, 0, None))
        places = iter(missing.tolist())
        batches = track(batches, math.ceil(len(missing) / _BATCH), f"features of {frozen.says}")
        for number, batch in enumerate(batches, start=1):
            check_stop(alone=True)
            with runtime.autocast():
                vectors = predictor.embed(batch["images"])
            for vector, weight, place in zip(vectors, batch["weight"].tolist(), places):
                if weight > 0:
                    features[place] = vector
                    store.put(keys[place], vector)
            tell(min(number * _BATCH / len(missing), 1.0))
            if time.monotonic() > deadline:
                break
    features = {place: vector for place, vector in features.items() if vector is not None}
    if not features:
        raise UserError(f"data.root: no image of {str(collection.root)!r} can be read")
    return torch.from_numpy(np.stack([*features.values()])), rows[[*features]]
