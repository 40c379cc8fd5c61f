"""Whether pictures copy training images: the nearest image of each picture, by their pixels at 16 px."""

from collections.abc import Iterable, Sequence
from itertools import compress

import numpy as np
import torch

from data.augment.transforms import EvalTransform
from data.collection.choose import spread
from data.open import Data
from data.stream.loader import EvaluationStream
from engine.frozen.features import PIXELS
from engine.measures.neighbours import find_nearest
from sdxl.pictures.texts import text_field, texts_of
from utils.contracts import Batch
from utils.io.files import Json
from utils.ranks import distributed

_MOST = 1_000  # training images that pictures are compared with
_SMALL = PIXELS.predictor


def trained_stream(data: Data) -> EvaluationStream:
    """Return the training images, evenly spread if there are many, for `find_nearest_images`; `text` is the path."""
    rows = spread(data.collection.rows("train"), _MOST)
    return data.prepared(rows, lambda example: text_field(example.row.path), _SMALL.preprocessing)


def find_nearest_images(pictures: Sequence[np.ndarray], trained: Iterable[Batch]) -> list[Json]:
    """Return the nearest training image of each picture, uint8 [H, W, 3], over all ranks; [] without any.

    novelty: 1 - the cosine of the pixels, from 0 for equal ones to 2.
    """
    embedded = []
    for batch in trained:
        embedded += compress(zip(texts_of(batch), _SMALL.embed(batch["images"])), batch["weight"] > 0)
    embedded = sum(distributed.gather_objects(embedded), [])
    if not embedded:
        return []
    paths, vectors = zip(*embedded)
    small = EvalTransform(_SMALL.preprocessing)
    views = torch.stack([small(torch.from_numpy(picture).permute(2, 0, 1)) for picture in pictures])
    near, rows = find_nearest(torch.from_numpy(_SMALL.embed(views)), torch.from_numpy(np.stack(vectors)), 1)
    nearest = zip(near[:, 0].tolist(), rows[:, 0].tolist())
    return [{"novelty": round(1 - cosine, 4), "nearest": paths[row]} for cosine, row in nearest]
