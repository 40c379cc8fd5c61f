r"""Slow offline work on a collection.

    python prepare.py job=glyphs                                              draw the embedded collection
    python prepare.py job=manifest data=image_folder data.root=PATH           check all images, write manifest.parquet
    python prepare.py job=manifest data=image_folder data.root=PATH verify=false             without decoding them
    python prepare.py job=vocabulary data=image_folder data.root=PATH vocabulary.output=FILE   the tags to train
    python prepare.py job=warm_cache data=image_folder data.root=PATH data.cache.disk_gib=100    fill the disk cache
    python prepare.py job=pack data=image_folder data.root=PATH pack.output=FOLDER    the images as tar shards
    python prepare.py job=idx source=FOLDER data=image_folder data.root=collections/fashion_mnist \
        'class_names=[t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle_boot]'

    python prepare.py job=statistics data=image_folder data.root=PATH         what is in a collection, as an HTML page
        likewise job=count, verify, duplicates, filter, downsample, split, copy and undo (docs/care.md)

job=idx writes IDX files as class folders. Those of Fashion-MNIST lie in the folder that
`dpkg -L dataset-fashion-mnist` names, of Debian's package of that name.
"""

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from data.cache.warm import ADDED, THERE, UNREADABLE, estimate_missing, warm_cache
from data.care.config import DeduplicateConfig, DownsampleConfig, FilterConfig, StatisticsConfig, SubsetConfig
from data.care.downsample import downsample_images
from data.care.duplicates import remove_duplicates
from data.care.filter import filter_images
from data.care.moves import TRASH, finish_interrupted, undo
from data.care.split import split_images
from data.care.statistics import count_images, write_statistics
from data.care.subset import copy_images
from data.care.verify import verify_files
from data.care.work import Work
from data.config import DataConfig, PackConfig, VocabularyConfig, WarmCacheConfig
from data.glyphs import draw_glyphs, glyphs_ready
from data.idx import idx_to_folders
from data.open import load_collection
from data.open import open_images
from data.manifest_writer import write_manifest
from data.pack import pack_collection
from data.scan import check_root
from data.tags.vocabulary import make_vocabulary
from utils.canvas import DEFAULT
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathText, Strict
from utils.errors import UserError
from utils.io.files import output_errors
from utils.record.logging import get_logger
from utils.record.progress import counting
from utils.vocabulary import write_vocabulary

log = get_logger(__name__)

_DRY_RUN = "dry run: nothing is written"
# The jobs that read a key or section; the others refuse it.
_READ_BY = {
    "verify": ("manifest",),
    "duplicates": ("manifest",),
    "source": ("idx", "undo"),
    "class_names": ("idx",),
    "vocabulary": ("vocabulary",),
    "warm_cache": ("warm_cache",),
    "pack": ("pack",),
    "apply": ("duplicates", "filter", "downsample", "split"),
    "trash": ("duplicates", "filter", "downsample", "split"),
    "report": ("statistics", "verify", "duplicates", "filter", "downsample"),
    "statistics": ("statistics",),
    "deduplicate": ("duplicates",),
    "filter": ("filter", "copy"),
    "downsample": ("downsample",),
    "subset": ("copy",),
}


class PrepareConfig(Strict):
    """`verify` decodes every image; unreadable ones get weight 0 in the manifest.

    `duplicates` finds near-duplicates as well, and needs `verify`.

    `class_names` has a name for each label. The sections are those of data/config.py and data/care/config.py.
    """

    job: Literal[
        "glyphs", "manifest", "idx", "vocabulary", "warm_cache", "pack",
        "count", "statistics", "verify", "duplicates", "filter", "downsample", "split", "copy", "undo",
    ]  # fmt: skip
    dry_run: bool
    verify: bool
    duplicates: bool
    source: PathText | None
    class_names: list[str] | None
    data: DataConfig
    pack: PackConfig
    vocabulary: VocabularyConfig
    warm_cache: WarmCacheConfig
    apply: bool
    trash: PathText | None
    report: PathText
    statistics: StatisticsConfig
    deduplicate: DeduplicateConfig
    filter: FilterConfig
    downsample: DownsampleConfig
    subset: SubsetConfig


@entry_point("prepare", PrepareConfig)
def main(config: PrepareConfig, job: Job) -> str:
    """Do the one job that was asked for."""
    for override in job.overrides:
        key, _, value = override.lstrip("+").partition("=")
        readers = _READ_BY.get(key.partition(".")[0], (config.job,))
        if config.job not in readers:
            raise UserError(
                f"{key}: {value} is read by job={' and '.join(readers)} only, not by job={config.job}; remove {key}"
            )
    jobs = {
        "idx": write_class_folders,
        "glyphs": prepare_glyphs,
        "manifest": prepare_manifest,
        "vocabulary": prepare_vocabulary,
        "warm_cache": fill_disk_cache,
        "pack": prepare_shards,
    }
    return jobs.get(config.job, care_for)(config)


# ------------------------------------------------------------------------------------------------------------- job=idx


def write_class_folders(config: PrepareConfig) -> str:
    """Write the IDX files of `source` as class folders into `data.root`."""
    if config.data.name != "image_folder":
        raise UserError(
            f"data: job=idx writes class folders, not {config.data.name}; set data=image_folder data.root=FOLDER"
        )
    if config.source is None:
        raise UserError("source: job=idx needs it; set source to the folder that holds the IDX files")
    if config.dry_run:
        return _DRY_RUN
    with counting("writing the images") as progress:
        if not idx_to_folders(config.source, config.data.root, config.class_names, progress):
            log.info("%s is there already", config.data.root)
    return f"class folders in {config.data.root}"


# ---------------------------------------------------------------------------------------------------------- job=glyphs


def prepare_glyphs(config: PrepareConfig) -> str:
    """Draw the embedded collection into `data.root`."""
    if config.dry_run:
        return _DRY_RUN
    if glyphs_ready(Path(config.data.root)):
        log.info("%s is there already", config.data.root)
    else:
        with counting("drawing the glyphs") as progress:
            draw_glyphs(Path(config.data.root), progress)
    return f"glyphs in {config.data.root}"


# -------------------------------------------------------------------------------------------------------- job=manifest


def prepare_manifest(config: PrepareConfig) -> str:
    """Check the images of `data.root` and write its manifest."""
    if config.duplicates and not config.verify:
        raise UserError("duplicates: true, and verify=false decodes no image; set verify=true, or duplicates=false")
    if config.dry_run:
        check_root(config.data.root)  # which write_manifest does too
        return _DRY_RUN
    report = write_manifest(
        config.data.root,
        validation_fraction=config.data.validation_fraction,
        verify=config.verify,
        duplicates=config.duplicates,
        max_pixels=config.data.max_pixels,
    )
    for line in report.unreadable_lines(most=20):
        log.warning("%s", line)
    background = DEFAULT if config.data.background is None else config.data.background
    for line in (*report.trait_lines(background), *report.duplicate_lines()):
        log.info("%s", line)
    splits = ", ".join(f"{count:,} {split}" for split, count in report.splits.items())
    log.info(
        "wrote %s: %s images (%s), %d classes, %d tags, %d unreadable",
        report.path, f"{report.rows:,}", splits, len(report.classes), len(report.tags), len(report.unreadable),
    )  # fmt: skip
    return f"{report.rows} images, {len(report.unreadable)} unreadable"


# ------------------------------------------------------------------------------------------------------------ job=pack


def prepare_shards(config: PrepareConfig) -> str:
    """Write the images of `data.root` as tar shards into `pack.output`."""
    wanted = config.pack
    if wanted.output is None:
        raise UserError("pack.output: job=pack needs it; set it to a new folder, as collections/packed")
    if config.dry_run:
        check_root(config.data.root)
        return _DRY_RUN
    collection = load_collection(config.data)
    with counting("packing the images") as progress:
        report = pack_collection(collection, Path(wanted.output), wanted.shard_mib, progress)
    log.info(
        "wrote %s: %s images in %d shards (%d of them were there), %d images of weight 0 left out",
        wanted.output, f"{report.rows:,}", report.shards, report.kept, report.weightless,
    )  # fmt: skip
    return f"{report.rows} images in {report.shards} shards"


# ------------------------------------------------------------------------------------------------------ job=vocabulary


def prepare_vocabulary(config: PrepareConfig) -> str:
    """Collect the tags of `data.root` into a vocabulary."""
    wanted = config.vocabulary
    if wanted.output is None:
        raise UserError("vocabulary.output: job=vocabulary needs it; set it to a file, as outputs/selected_tags.csv")
    if config.dry_run:
        check_root(config.data.root)
        return _DRY_RUN
    made, report = make_vocabulary(load_collection(config.data), wanted, "vocabulary.")
    with output_errors("vocabulary.output", Path(wanted.output)):
        write_vocabulary(Path(wanted.output), made)
    log.info("wrote %s: %s", wanted.output, report)
    return f"{len(made)} tags"


# ------------------------------------------------------------------------------------------------------ job=warm_cache


def fill_disk_cache(config: PrepareConfig) -> str:
    """Decode the images of `data.root` into the cache on disk."""
    if config.data.cache.disk_gib == 0:
        raise UserError("data.cache.disk_gib: 0 is no cache, and job=warm_cache fills it; set the GiB that it may take")
    collection, wanted = load_collection(config.data), config.warm_cache
    background = DEFAULT if config.data.background is None else config.data.background
    source = open_images(collection, config.data, wanted.channels, background, shortest_px=wanted.shortest_px)
    rows = np.flatnonzero(collection.weights())
    if config.dry_run:
        missing, size = estimate_missing(source, rows)
        line = f"dry run: {missing:,} of {len(rows):,} images are missing, about {size / 2**30:.2f} GiB"
        log.info("%s", line)
        return line
    with counting("filling the cache") as progress:
        warmed = warm_cache(source, rows, progress)
    if evicted := source.counts.totals()["evicted"]:
        log.warning(
            "data.cache.disk_gib: %g is too little for all images: the oldest %s records made room for others",
            config.data.cache.disk_gib, f"{evicted:,}",
        )  # fmt: skip
    line = f"{warmed[ADDED]:,} images added, {warmed[THERE]:,} were there, {warmed[UNREADABLE]:,} unreadable"
    log.info("%s: %s", config.data.cache.folder, line)
    return line


# ------------------------------------------------------------------------------------------- looking after a collection

CARE: dict[str, Callable[[Work, PrepareConfig], str]] = {
    "count": lambda work, config: count_images(work),
    "statistics": lambda work, config: write_statistics(work, config.statistics),
    "verify": lambda work, config: verify_files(work),
    "duplicates": lambda work, config: remove_duplicates(work, config.deduplicate),
    "filter": lambda work, config: filter_images(work, config.filter),
    "downsample": lambda work, config: downsample_images(work, config.downsample),
    "split": lambda work, config: split_images(work),
    "copy": lambda work, config: copy_images(work, config.subset, config.filter),
    "undo": lambda work, config: undo(work, config.source),
}


def care_for(config: PrepareConfig) -> str:
    """Do one of these jobs on the collection of `data.root`, after what a killed one has left to do."""
    root = check_root(config.data.root)
    trash = root / TRASH if config.trash is None else Path(config.trash)
    work = Work(config.job, config.data, config.apply, Path(config.report), trash)
    if config.dry_run:
        return _DRY_RUN
    if config.apply:
        finish_interrupted(work)
    line = CARE[config.job](work, config)
    log.info("%s", line)
    return line


if __name__ == "__main__":
    main()
