"""Turn sd-scripts' dataset_config into an experiment of finetune_sdxl.py (prepare.py job=import).

Source: kohya-ss/sd-scripts:library/config_util.py and docs/config_README-en.md.
"""

import json
import operator
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from data.config import DataConfig
from data.tools.tool import Tool
from utils.config.bounds import Count, CountOrZero, Fraction, Side
from utils.config.messages import ConfigError, validate
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.formats.spelling import split_tags
from utils.io.files import output_errors, readable, write_text
from utils.record.logging import get_logger

log = get_logger(__name__)

_UNIT = 32  # the sides of SDXL's pictures are multiples
_WITHOUT = {
    "caption_separator", "secondary_separator", "caption_dropout_every_n_epochs", "token_warmup_min",
    "token_warmup_step", "color_aug", "face_crop_aug_range", "resize_interpolation", "cache_info", "validation_seed",
    "network_multiplier", "custom_attributes", "conditioning_data_dir",
}  # fmt: skip
_ALPHA = {"source": "alpha", "floor": 0.0, "normalise": False}  # task.mask
_INSTEAD = {
    "caption_extension": "x.caption, x.txt and x.json are read; the first one with a caption counts",
    "metadata_file": "meta_*.json in image_dir is read; copy another file there",
    "enable_wildcard": "one of several lines is drawn, and {a|b} is text",
}


class _Options(Strict):
    """The keys of a subset that have a counterpart, with the defaults of sd-scripts."""

    image_dir: PathText
    num_repeats: Count = 1
    class_tokens: str | None = None
    is_reg: bool = False
    alpha_mask: bool = False
    shuffle_caption: bool = False
    keep_tokens: CountOrZero = 0
    keep_tokens_separator: str | None = None
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: Fraction = 0.0
    caption_tag_dropout_rate: Fraction = 0.0
    enable_wildcard: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    resolution: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] = 1024  # or width and height
    batch_size: Count = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    bucket_reso_steps: Side = 64
    min_bucket_reso: Side = 256
    max_bucket_reso: Side = 1024
    validation_split: Fraction = 0.0

    def captions(self) -> dict[str, Any]:
        """Return the values of task.captions. A prefix counts among the tags that are kept."""
        fixed = self.keep_tokens_separator or "\0"
        prefix, suffix = (split_tags(text.replace(fixed, ",")) for text in (self.caption_prefix, self.caption_suffix))
        return {
            "lines": "one_of" if self.enable_wildcard else "first",
            "shuffle": self.shuffle_caption,
            "keep_first": max(0, self.keep_tokens - len(prefix)),
            "keep_tokens_separator": self.keep_tokens_separator,
            "caption_dropout": self.caption_dropout_rate,
            "tag_dropout": self.caption_tag_dropout_rate,
            "prefix": ", ".join(prefix),
            "suffix": ", ".join(suffix),
        }


class Import(Tool):
    """Read `source`, a dataset_config of sd-scripts in TOML or JSON, and write `output`, a file for experiment=FILE."""

    name: Literal["import"]
    source: PathText
    output: PathText

    def check(self, data: DataConfig) -> str:
        """Read the source alone."""
        _convert(*self._read_subsets())
        return "dry run: nothing is written"

    def run(self, data: DataConfig) -> str:
        """Convert the file. Raises UserError (`job.source`, `job.output`)."""
        subsets, notes = self._read_subsets()
        values = _convert(subsets, notes)
        notes = list(dict.fromkeys(notes))
        head = ["@package _global_", f"From {self.source} of sd-scripts. Other than there:", *notes]
        text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        with output_errors("job.output", Path(self.output)):
            write_text(Path(self.output), text)
        for note in notes:
            log.warning("job.source: other than in sd-scripts: %s", note)
        return f"{len(subsets)} subsets; next: python finetune_sdxl.py experiment={self.output} model.path=BASE"

    def _read_subsets(self) -> tuple[list[_Options], list[str]]:
        """Return the options of each subset, and notes. A subset goes before its dataset, and that before general."""
        file = Path(self.source)
        subsets = []
        notes = []
        with about("job.source"), readable(file, "dataset_config"):
            text = file.read_text(encoding="utf-8")
            read = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
            general = {**read.pop("general", {})}
            datasets = read.pop("datasets", [])
            levels = [
                {"general": general, f"datasets.{number}": dataset, f"datasets.{number}.subsets.{index}": subset}
                for number, dataset in enumerate(datasets)
                for index, subset in enumerate(dataset.pop("subsets", []))
            ]
            if not levels or read:
                raise UserError(f"job.source: {file} has {', '.join(read) or 'no subset'}; write datasets with subsets")
            for each in levels:
                where = {key: level for level, given in each.items() for key in given}
                values = {key: value for given in each.values() for key, value in given.items()}
                for key in (_WITHOUT | _INSTEAD.keys()) & values.keys():
                    if values[key]:
                        notes.append(f"{where[key]}.{key}={values[key]!r}: {_INSTEAD.get(key, 'has no counterpart')}")
                    if key not in _Options.model_fields:
                        del values[key]
                try:
                    subsets.append(validate(values, _Options))
                except ConfigError as error:
                    lines = (f"{where.get(line.partition(':')[0], [*each][-1])}.{line}" for line in error.args)
                    raise UserError(f"job.source: {file}: {'; '.join(lines)}") from None
        return subsets, sorted(set(notes))


def _convert(subsets: list[_Options], notes: list[str]) -> dict[str, Any]:
    """Return the values of an experiment; add to `notes` what differs in it."""

    def one(key: str, read: Callable[[_Options], Any]) -> Any:
        if any(read(subset) != read(subsets[0]) for subset in subsets):
            notes.append(f"{key}: {read(subsets[0])!r} for all, although subsets differ")
        return read(subsets[0])

    def whole(side: int) -> int:
        if side % _UNIT:
            notes.append(f"{side} px: {max(side // _UNIT, 1) * _UNIT} px here, a multiple of {_UNIT}")
        return max(side // _UNIT, 1) * _UNIT

    def size_hw(subset: _Options) -> tuple[int, ...]:
        sides = subset.resolution if isinstance(subset.resolution, list) else [subset.resolution] * 2
        return tuple(map(whole, reversed(sides)))

    places: dict[str, _Options] = {}
    for subset in subsets:
        places.setdefault(os.path.abspath(os.path.expanduser(subset.image_dir)), subset)
    root = os.path.commonpath(places)
    sizes = sorted(set(map(size_hw, subsets)))
    captions = [subset.captions() for subset in places.values()]
    priors = sum(each.is_reg for each in places.values())
    common = {key: value for key, value in captions[0].items() if all(own[key] == value for own in captions)}
    concepts = []
    has_masks = any(subset.alpha_mask for subset in subsets)
    for (folder, subset), own in zip(places.items(), captions):
        how = {"share": 0.5 / priors, "is_prior": True} if subset.is_reg else {"repeats": subset.num_repeats}
        concept = {"path": os.path.relpath(folder, root), **how, "trigger": subset.class_tokens}
        concept["captions"] = {key: value for key, value in own.items() if key not in common}
        concepts.append({**concept, "mask": subset.alpha_mask if has_masks else None})
        if subset.shuffle_caption and (own["prefix"] or own["suffix"]):
            notes.append("caption_prefix, caption_suffix: stay at their ends; sd-scripts shuffles what is not kept")
    if priors > 1:
        notes.append("is_reg: several folders have equal parts of their half of an epoch")
    if len(places) < len(subsets):
        notes.append("image_dir: of a folder that is there several times, the first subset counts, in each resolution")
    elif len(sizes) > 1:
        notes.append("resolution: the size of an image decides between several, not its subset")
    # sd-scripts skips no image, however much of it is cropped.
    buckets = {"max_crop": 1.0, "assign": "all" if len(places) < len(subsets) else "no_upscale"}
    buckets["flip"] = 0.5 * one("flip_aug", lambda subset: subset.flip_aug)
    buckets["crop"] = "random" if one("random_crop", lambda subset: subset.random_crop) else "centre"
    if one("enable_bucket", lambda subset: subset.enable_bucket):
        buckets["areas_px"] = [height * width for height, width in sizes]
        names = {"step_px": "bucket_reso_steps", "min_px": "min_bucket_reso", "max_px": "max_bucket_reso"}
        buckets |= {ours: whole(one(theirs, operator.attrgetter(theirs))) for ours, theirs in names.items()}
        if one("bucket_no_upscale", lambda subset: subset.bucket_no_upscale):
            buckets |= {"small": "native", "max_upscale": 1.0}
    else:
        buckets["sizes_hw"] = [[list(size)] for size in sizes]
    batch_size = one("batch_size", lambda subset: subset.batch_size)
    fraction = one("validation_split", lambda subset: subset.validation_split)
    return {
        "data": {"root": root, "validation_fraction": fraction, "concepts": concepts},
        "task": {"chunk": batch_size, "buckets": buckets, "captions": common, "mask": _ALPHA if has_masks else None},
        "loop": {"batch_size": batch_size, "micro_batch_size": batch_size},
    }
