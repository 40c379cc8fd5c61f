"""Whether pictures copy training images: the nearest image of each picture, by their pixels at 16 px."""

from collections.abc import Iterable
from itertools import compress

import torch
from numpy import ndarray

from data.collection.choose import spread
from data.images.prepare import prepare
from data.open import Data
from data.stream.loader import EvaluationStream
from engine.frozen.features import PIXELS
from sdxl.pictures.texts import text_field, texts_of
from utils.contracts import Batch
from utils.formats.preprocessing import Preprocessing
from utils.io.files import Json
from utils.ranks import distributed

_MOST = 1_000  # training images that pictures are compared with
_SMALL = PIXELS.predictor.preprocessing


def trained_stream(data: Data) -> EvaluationStream:
    """Return the training images, evenly spread if there are many, for `find_nearest_images`; `text` is the path."""
    rows = spread(data.collection.rows("train"), _MOST)
    return data.prepared(rows, lambda example: text_field(example.row.path), _SMALL)


def find_nearest_images(pictures: Iterable[ndarray], trained: Iterable[Batch]) -> list[Json]:
    """Return the nearest training image of each picture, uint8 [H, W, 3], over all ranks; [] without any.

    novelty: 1 - the cosine of the pixels, from 0 for equal ones to 2.
    """
    read = []
    for batch in trained:
        read += compress(zip(texts_of(batch), batch["images"].cpu() - 127.5), batch["weight"] > 0)
    images = dict(sum(distributed.gather_objects(read), []))
    if not images:
        return []
    known = torch.stack([*images.values()]).flatten(1)
    small_size = Preprocessing.model_validate(_SMALL)
    nearest = []
    for picture in pictures:
        small = torch.from_numpy(prepare(picture, small_size)).permute(2, 0, 1) - 127.5
        novelty, path = min(zip((1 - torch.cosine_similarity(small.flatten(), known)).tolist(), images))
        nearest.append({"novelty": round(novelty, 4), "nearest": path})
    return nearest
