"""Slow offline work on a collection.

python prepare.py job=glyphs                                          draw the embedded collection
python prepare.py job=manifest data=image_folder data.root=PATH       check every image, write manifest.parquet
"""

from pathlib import Path
from typing import Literal

from data.config import DataConfig
from data.glyphs import draw_glyphs, glyphs_ready
from data.manifest_writer import write_manifest
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)


class PrepareConfig(Strict):
    """`verify` decodes every image; unreadable ones get weight 0 in the manifest."""

    job: Literal["glyphs", "manifest"]
    verify: bool
    data: DataConfig


@entry_point("prepare", PrepareConfig)
def main(config: PrepareConfig, job: Job) -> str:
    """Do the one job that was asked for."""
    if config.job == "glyphs":
        if glyphs_ready(Path(config.data.root)):
            log.info("%s is there already", config.data.root)
        else:
            with counting("drawing the glyphs") as progress:
                draw_glyphs(Path(config.data.root), progress)
        return f"glyphs in {config.data.root}"
    with counting("reading the images") as progress:
        report = write_manifest(
            config.data.root,
            validation_fraction=config.data.validation_fraction,
            verify=config.verify,
            max_pixels=config.data.max_pixels,
            progress=progress,
        )
    for line in report.unreadable_lines(most=20):
        log.warning("%s", line)
    for line in report.trait_lines():
        log.info("%s", line)
    splits = ", ".join(f"{count:,} {split}" for split, count in report.splits.items())
    log.info(
        "wrote %s: %s images (%s), %d classes, %d tags, %d unreadable",
        report.path, f"{report.rows:,}", splits, len(report.classes), len(report.tags), len(report.unreadable),
    )  # fmt: skip
    return f"{report.rows} images, {len(report.unreadable)} unreadable"


if __name__ == "__main__":
    main()
