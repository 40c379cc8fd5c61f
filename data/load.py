"""From a configuration to a collection. data/open.py goes on, to its images and batches; this part needs no torch."""

from pathlib import Path

import numpy as np

from data.collection.collection import Collection
from data.collection.index import CACHE, index_collection
from data.config import DataConfig
from data.images.open import allow_pixels, decoder_versions
from data.layouts.table import SPLITS, has_value
from utils.ranks import distributed
from utils.record.logging import log


def load_collection(config: DataConfig) -> Collection:
    """Index the collection on rank 0 and open it on every rank. Missing glyphs are drawn first."""

    allow_pixels(config.max_pixels)

    def index() -> str:
        if config.name == "glyphs":
            from data.layouts.glyphs import draw_glyphs

            draw_glyphs(Path(config.root))
        return str(index_collection(config.root, cache=CACHE, **config.index_settings()))

    collection = Collection(config.root, Path(distributed.rank_zero_call(index)))
    log.debug("collection: %s, read by %s", describe_collection(collection), decoder_versions())
    return collection


def describe_collection(collection: Collection) -> str:
    """Describe a collection in one line: root, splits and classes."""
    train, val, test = (f"{len(collection.rows(split)):,}" for split in SPLITS)
    counts = (
        f"{train} training and {val} validation"
        if test == "0"
        else f"{train} training, {val} validation and {test} test"
    )
    classes = len(collection.class_names("train") or collection.class_names("test"))
    rows = np.concatenate([collection.rows("train"), collection.rows("val")])
    bare = collection.table["label"].take(rows).null_count
    tagged = has_value(collection.table["tags"]).sum()
    unlabelled = f", {tagged:,} with tags" if tagged else ", without labels"
    labels = f" of {classes} classes" if classes else unlabelled
    labels += f", {bare:,} without a label" if classes and bare else ""
    unused = np.count_nonzero(collection.weights() == 0)
    without = f", without {unused:,} of weight 0" if unused else ""
    return f"{collection.root}: {counts} images{labels}{without}"
