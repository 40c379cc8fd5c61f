"""From configuration to collection and loaders."""

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.collection import Collection, index_collection, open_collection
from data.config import AugmentConfig, DataConfig, GlyphsConfig
from data.decode import pillow_version
from data.glyphs import draw_glyphs, glyphs_ready
from data.loader import EvaluationLoader, Fields, ImageReader, TrainLoader, UnreadableLog
from data.stream import BalancedSampler, Sampler, ShuffledSampler
from data.transforms import EvalTransform, TrainTransform
from utils.errors import UserError
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

CACHE = Path("outputs/cache/collections")


def load_collection(config: DataConfig) -> Collection:
    """Index the collection on rank 0 (drawing the glyphs first where they are missing) and open it on every rank."""

    def index() -> str:
        if isinstance(config, GlyphsConfig) and not glyphs_ready(Path(config.root)):
            log.info("drawing the glyph collection into %s (once, some seconds)", config.root)
            with counting("drawing the glyphs") as progress:
                draw_glyphs(Path(config.root), progress)
        return str(index_collection(config.root, validation_fraction=config.validation_fraction, cache=CACHE))

    collection = open_collection(config.root, Path(distributed.rank_zero_call(index)))
    log.info(
        "collection: %s, %s training and %s validation images, read by %s",
        config.root,
        f"{len(collection.rows('train')):,}",
        f"{len(collection.rows('val')):,}",
        pillow_version(),
    )
    return collection


def training_rows(collection: Collection, patterns: list[str] | None) -> np.ndarray:
    """Return the rows of the training split whose path matches a pattern (`loop.train_paths`), ascending; None for all.

    Raises UserError where a pattern matches none of them.
    """
    rows = collection.rows("train")
    if patterns is None or len(rows) == 0:
        return rows
    paths = collection.table["path"].take(rows).to_pylist()
    chosen = np.zeros(len(rows), dtype=bool)
    for pattern in patterns:
        matches = np.array([fnmatch.fnmatchcase(path, pattern) for path in paths])
        if not matches.any():
            raise UserError(
                f"loop.train_paths: {pattern!r} matches none of the {len(rows):,} training images; a path reads like "
                f"{paths[0]!r} (* also matches /)"
            )
        chosen |= matches
    log.info("loop.train_paths: %s of %s training images", f"{chosen.sum():,}", f"{len(rows):,}")
    return rows[chosen]


def build_sampler(name: str, rows: np.ndarray, class_ids: np.ndarray, seed: int) -> Sampler:
    """Return the order that `loop.sampling` names; class_ids [len(rows)] are those of the rows."""
    match name:
        case "shuffled":
            return ShuffledSampler(rows, seed)
        case "balanced":
            return BalancedSampler(rows, class_ids, seed)


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of the rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // most))]


def build_loaders(
    collection: Collection,
    config: DataConfig,
    augment: AugmentConfig,
    fields: Fields,
    *,
    train_rows: np.ndarray,
    val_rows: np.ndarray,
    channels: int,
    seed: int,
    loop: Any,
    runtime: Any,
    prefetch_batches: int,
    run_path: Path,
) -> tuple[TrainLoader, dict[str, EvaluationLoader]]:
    """Return the endless training stream, and the validation rows under `val`, each once over all ranks.

    `fields` adds what the task needs to a sample; `loop` gives sampling and batch_size (engine/config.py), `runtime`
    device and workers (engine/runtime.py); unreadable images are listed in the run's folder.
    """
    unreadable = UnreadableLog(run_path / "unreadable.jsonl")

    class_ids = collection.class_ids(collection.class_names("train"))
    loader = TrainLoader(
        ImageReader(collection, TrainTransform(augment), fields, channels=channels, max_pixels=config.max_pixels),
        build_sampler(loop.sampling, train_rows, class_ids[train_rows], seed),
        seed=seed,
        device=runtime.device,
        workers=runtime.workers,
        prefetch_batches=prefetch_batches,
        unreadable=unreadable,
    )
    evaluation = plain_loader(
        collection, config, augment, fields, val_rows, channels=channels, seed=seed, batch_size=loop.batch_size,
        runtime=runtime, unreadable=unreadable,
    )  # fmt: skip
    return loader, {"val": evaluation}


def choose_probe_rows(
    class_ids: np.ndarray, train_rows: np.ndarray, val_rows: np.ndarray, train_images: int, val_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to fit a probe of features to and rows to measure it on, both evenly spread over the classes.

    class_ids [N] are those of all rows, -1 for none. The second are of classes that the first show; either may be
    empty.
    """

    def pick(rows: np.ndarray, most: int) -> np.ndarray:
        return spread(rows[np.argsort(class_ids[rows], kind="stable")], most)

    train = pick(train_rows[class_ids[train_rows] >= 0], train_images)
    val = pick(val_rows[np.isin(class_ids[val_rows], class_ids[train])], val_images)
    return train, val


def build_probe_loaders(
    collection: Collection,
    config: DataConfig,
    augment: AugmentConfig,
    label_fields: Callable[[np.ndarray], Fields],
    probe: Any,
    *,
    channels: int,
    seed: int,
    batch_size: int,
    runtime: Any,
    unreadable: UnreadableLog,
) -> dict[str, EvaluationLoader]:
    """Return `probe_train` and `probe_val`; where there are too few labels, nothing, and a line in the log says so.

    `label_fields` makes of class ids [N] what adds a label to a sample; `probe` gives train_images and val_images
    (engine/tasks/config.py).
    """
    class_ids = collection.class_ids(collection.class_names("train"))
    train, val = choose_probe_rows(
        class_ids, collection.rows("train"), collection.rows("val"), probe.train_images, probe.val_images
    )
    classes = len(np.unique(class_ids[train]))
    if classes < 2 or len(val) == 0:
        found = (
            f"{len(train):,} labelled training images of {classes} classes and {len(val):,} validation images of them"
        )
        log.info(
            "probe: off, since %s gives it %s; task.probe.every_epochs=null leaves out this line", config.root, found
        )
        return {}
    log.info("probe: %s training and %s validation images of %d classes", f"{len(train):,}", f"{len(val):,}", classes)
    return {
        name: plain_loader(
            collection, config, augment, label_fields(class_ids), rows, channels=channels, seed=seed,
            batch_size=batch_size, runtime=runtime, unreadable=unreadable,
        )
        for name, rows in (("probe_train", train), ("probe_val", val))
    }  # fmt: skip


def plain_loader(
    collection: Collection,
    config: DataConfig,
    augment: AugmentConfig,
    fields: Fields,
    rows: np.ndarray,
    *,
    channels: int,
    seed: int,
    batch_size: int,
    runtime: Any,
    unreadable: UnreadableLog,
    augmented: bool = False,
) -> EvaluationLoader:
    """Return a loader of some rows, each exactly once over all ranks, prepared as validation images are.

    With `augmented` as training images are: the draw of a row is the same each time.
    """
    if augmented:
        transform = TrainTransform(augment)
    else:
        transform = EvalTransform(augment.image_size_hw, augment.eval_crop, augment.interpolation)
    return EvaluationLoader(
        ImageReader(collection, transform, fields, channels=channels, max_pixels=config.max_pixels),
        rows,
        seed=seed,
        batch_size=batch_size,
        device=runtime.device,
        workers=runtime.workers,
        unreadable=unreadable,
    )
