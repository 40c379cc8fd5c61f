"""The sections of the tools in conf/prepare.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from utils.config.bounds import Count, Factor, KnobValue, Side
from utils.config.schema import PathText, Strict

_Aspect = Annotated[float, Field(ge=1, le=1e6)]


class StatisticsConfig(Strict):
    """`pixels` decodes the images, for brightness and format; without it the manifest's width and height are taken."""

    pixels: bool


class DeduplicateConfig(Strict):
    """What duplicates are: files of equal bytes, images that look alike (data/duplicates.py), or crops too
    (data/crops.py).
    """

    match: Literal["crop", "near", "exact"]


class FilterConfig(Strict):
    """What an image needs to stay; null asks for nothing.

    max_aspect: longer side / shorter side. ratings: one of them. min_score: in the manifest's column score.
    min_sharpness: as data/facts.py measures it.
    """

    min_tags: Count | None
    min_side_px: Side | None
    max_aspect: _Aspect | None
    ratings: list[str] | None
    min_score: KnobValue | None
    min_sharpness: Factor | None


class DownsampleConfig(Strict):
    """The longest side that an image keeps, and the quality of the JPEG and WebP files that are written."""

    longest_px: Side
    quality: Annotated[int, Field(ge=1, le=100)]


class SubsetConfig(Strict):
    """Which images job=copy copies to the folder `to`: those of a list of paths, with all of some tags."""

    to: PathText | None
    listed: PathText | None
    tags: list[str]
