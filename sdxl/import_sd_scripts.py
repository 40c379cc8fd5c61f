"""Turn sd-scripts' dataset_config into an experiment of finetune_sdxl.py (prepare.py job=import).

Source: kohya-ss/sd-scripts:library/config_util.py and docs/config_README-en.md.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from data.config import DataConfig
from data.tools.config import Import
from utils.config.bounds import Count, CountOrZero, Fraction, Side
from utils.config.messages import ConfigError, validate
from utils.config.schema import PathText, Strict
from utils.errors import UserError, about
from utils.formats.spelling import split_tags
from utils.io.files import Json, output_errors, readable, write_text
from utils.record.logging import log

_ALPHA = {"source": "alpha", "floor": 0.0, "normalise": False}  # task.mask
_WITHOUT = {
    **dict.fromkeys(
        ("caption_separator", "secondary_separator", "caption_dropout_every_n_epochs", "token_warmup_min")
        + ("token_warmup_step", "color_aug", "face_crop_aug_range", "resize_interpolation", "cache_info")
        + ("validation_seed", "network_multiplier", "custom_attributes", "conditioning_data_dir"),
        "has no counterpart",
    ),
    "caption_extension": "x.caption, x.txt and x.json are read; the first one with a caption counts",
    "metadata_file": "meta_*.json in image_dir is read; copy another file there",
}
_OF_ALL = ("flip_aug", "random_crop", "enable_bucket", "bucket_no_upscale", "batch_size", "validation_split")
_LIMITS = {"step_px": "bucket_reso_steps", "min_px": "min_bucket_reso", "max_px": "max_bucket_reso"}


class _Options(Strict):
    """The keys of a subset that have a counterpart, with the defaults of sd-scripts."""

    image_dir: PathText
    num_repeats: CountOrZero = 1
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

    @property
    def size_hw(self) -> tuple[int, int]:
        """The size of its pictures."""
        width, height = self.resolution if isinstance(self.resolution, list) else (self.resolution, self.resolution)
        return height, width

    def captions(self) -> Json:
        """Return the values of task.captions. The tags of a prefix count among those that are kept."""
        fixed = self.keep_tokens_separator or "\0"
        before, after = (text.replace(fixed, ",").strip() for text in (self.caption_prefix, self.caption_suffix))
        kept = self.keep_tokens - before.count(",")
        # Its comma, or a space, joins a prefix or suffix to a caption.
        prefix = _spell(before) + " " * (before[-1:] not in ("", ","))
        suffix = " " * (after[:1] not in ("", ",")) + _spell(after)
        return {
            "lines": "one_of" if self.enable_wildcard else "first",
            "shuffle": self.shuffle_caption,
            "keep_first": max(0, kept),
            "keep_tokens_separator": self.keep_tokens_separator,
            "caption_dropout": self.caption_dropout_rate,
            "tag_dropout": self.caption_tag_dropout_rate,
            "prefix": prefix,
            "suffix": suffix,
        }


def _spell(text: str) -> str:
    return ", ".join(split_tags(text))


def convert_config(job: Import, data: DataConfig) -> str:
    """Convert the file. Raises UserError (`job.source`, `job.output`)."""
    notes = []
    subsets = read_subsets(job, notes)
    values = _convert(subsets, notes)
    notes = sorted(set(notes))
    head = ["@package _global_", f"From {job.source} of sd-scripts. Other than there:", *notes]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with output_errors("job.output", Path(job.output)):
        write_text(Path(job.output), text)
    for note in notes:
        log.warning("job.source: other than in sd-scripts: %s", note)
    return f"{len(subsets)} subsets; next: python finetune_sdxl.py experiment={job.output} model.path=BASE"


def read_subsets(job: Import, notes: list[str]) -> list[_Options]:
    """Return the options of each subset. A subset goes before its dataset, and that before general.

    Adds to `notes` the options without a counterpart. Raises UserError.
    """
    file = Path(job.source)
    subsets = []
    with about("job.source"), readable(file, "dataset_config"):
        text = file.read_text(encoding="utf-8")
        read = yaml.safe_load(text) if file.suffix == ".json" else tomllib.loads(text)
        general = read.pop("general", {})
        for dataset in read.pop("datasets", []):
            for subset in dataset.pop("subsets", []):
                values = {**general, **dataset, **subset}
                for key in _WITHOUT.keys() & values.keys():
                    if value := values.pop(key):
                        notes.append(f"{key}={value!r}: {_WITHOUT[key]}")
                try:
                    options = validate(values, _Options)
                except ConfigError as error:
                    where = values.get("image_dir", "a subset")
                    raise UserError(f"job.source: {where}: {'; '.join(error.args)}") from None
                if options.num_repeats == 0:
                    log.info("job.source: %s has 0 repeats and is left out, as there", options.image_dir)
                else:
                    subsets.append(options)
        if not subsets or read:
            raise UserError(f"{file} has {', '.join(read) or 'no subset'}; write datasets with subsets")
    return subsets


def _convert(subsets: list[_Options], notes: list[str]) -> Json:
    """Return the values of an experiment; add to `notes` what differs in it."""
    first = subsets[0]
    for key in (*_OF_ALL, *_LIMITS.values()):
        if any(getattr(subset, key) != getattr(first, key) for subset in subsets):
            notes.append(f"{key}: {getattr(first, key)!r} for all, although subsets differ")
    places = {}
    for subset in subsets:
        places.setdefault(os.path.abspath(os.path.expanduser(subset.image_dir)), subset)
    is_several = len(places) < len(subsets)
    root = os.path.commonpath(places)
    sizes = sorted({subset.size_hw for subset in subsets})
    if is_several:
        notes.append("image_dir: of a folder that is there several times, the first subset counts, in each resolution")
    elif len(sizes) > 1:
        notes.append("resolution: the size of an image decides between several, not its subset")
    captions = [subset.captions() for subset in places.values()]
    common = {key: value for key, value in captions[0].items() if all(own[key] == value for own in captions)}
    if any(own["shuffle"] and (own["prefix"] or own["suffix"]) for own in captions):
        notes.append("caption_prefix, caption_suffix: stay at their ends; sd-scripts shuffles what is not kept")
    if any(own["prefix"] for own in captions):
        notes.append("caption_prefix: a caption that has it gets no second one")
    if any(subset.enable_wildcard for subset in subsets):
        notes.append("enable_wildcard: one of several lines is drawn, and {a|b} is text")
    has_masks = any(subset.alpha_mask for subset in subsets)
    concepts = []
    for (folder, subset), own in zip(places.items(), captions):
        concept = {"path": os.path.relpath(folder, root), "repeats": subset.num_repeats}
        concept |= {"trigger": subset.class_tokens, "is_prior": subset.is_reg}
        concept["captions"] = {key: value for key, value in own.items() if key not in common}
        concept["mask"] = subset.alpha_mask if has_masks else None
        concepts.append(concept)
    # sd-scripts skips no image, however much of it is cropped.
    buckets = {"max_crop": 1.0, "assign": "all" if is_several else "no_upscale"}
    buckets["flip"] = 0.5 * first.flip_aug
    buckets["crop"] = "random" if first.random_crop else "centre"
    if first.enable_bucket:
        buckets["areas_px"] = [height * width for height, width in sizes]
        buckets |= {ours: getattr(first, theirs) for ours, theirs in _LIMITS.items()}
    else:
        buckets["sizes_hw"] = [[list(size)] for size in sizes]
    if first.enable_bucket and first.bucket_no_upscale:
        buckets |= {"small": "native", "max_upscale": 1.0}
    return {
        "data": {"root": root, "validation_fraction": first.validation_split, "concepts": concepts},
        "task": {
            "chunk": first.batch_size,
            "buckets": buckets,
            "captions": common,
            "mask": _ALPHA if has_masks else None,
            "loss": {"weighting": "none"},  # min_snr_gamma is on its command line
        },
        "loop": {"batch_size": first.batch_size, "micro_batch_size": first.batch_size},
    }
