"""The formats that export.py writes, each a function of (weights, folder, config) that returns a report.

A function writes into an empty folder and compares what it wrote with PyTorch; only then do the files take their names.
The libraries are imported where they are used.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from engine.exports.sdxl import SDXL_FORMATS
from engine.exports.weights import Weights
from models.export import tag_forms
from models.export.model_card import refuse_other_format, write_card
from models.export.onnx_file import OnnxConfig, export_onnx
from models.export.targets import TARGETS, export_folder
from utils.config.schema import PathText
from utils.errors import UserError, close_names
from utils.io.weights import WEIGHT_NAMES
from utils.thresholds import PER_TAG, find_thresholds
from utils.vocabulary import FACTS, vocabulary_of

_ONNX_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx"}
_TAG_FILES = {"wd14": "model.onnx", "imgutils": "model.onnx", "cl_tagger": "model_optimized.onnx"}


def check_format(name: str) -> str:
    """Raise ValueError for a format that no weights have."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; {close_names(name, FORMATS)}")
    return name


class ExportConfig(OnnxConfig):
    """`weights` is best, last or ema of `run_dir`, or a weight file of ours.

    `output` is a folder (null: export/ in the run folder, export/FORMAT/ for others than onnx). `licence` replaces what
    is known of the licence of the source weights.
    """

    format: Annotated[str, AfterValidator(check_format)]
    run_dir: PathText | None
    weights: PathText
    output: PathText | None
    backbone_only: bool
    thresholds: PathText | None
    licence: str | None
    dry_run: bool

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.run_dir is None and self.weights in WEIGHT_NAMES:
            raise ValueError(f"run_dir: must be given for weights={self.weights}; add run_dir=RUN, or weights=FILE")
        if self.run_dir is None and self.output is None:
            raise ValueError("output: must be given where there is no run_dir; add output=FOLDER")
        if self.precision == "fp16" and self.format not in _IN_FP16:
            raise ValueError(f"precision: format={self.format} does not read it; remove precision, or set format=onnx")
        if self.dynamic_size and self.format != "onnx":
            raise ValueError(f"dynamic_size: format={self.format} does not read it; remove it, or set format=onnx")
        return self


Format = Callable[[Weights, Path, ExportConfig], dict[str, Any]]


def write_folder(name: str, weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the files of one of TARGETS."""
    network = weights.model.network if name in ("timm", "transformers") else weights.whole
    return export_folder(name, network, weights.metadata, folder, config.accepted)


def write_onnx(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write an ONNX file."""
    path = folder / _ONNX_FILES[config.precision]
    difference = export_onnx(weights.model, weights.metadata, path, config)
    write_card(folder, "onnx", path.name, weights.metadata)
    return {"file": path.name, "onnx_max_abs_diff": difference}


def write_tagger(form: str, weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write an ONNX file in one of the forms of models/export/tag_forms.py, and what lies beside it."""
    vocabulary, preprocessing = vocabulary_of(weights.metadata), weights.metadata["preprocessing"]
    tag_forms.check_images(form, preprocessing)
    thresholds = find_thresholds(config.thresholds, config.run_dir, vocabulary)
    kept, rows = tag_forms.to_wd_order(vocabulary) if form == "wd14" else (vocabulary, list(range(len(vocabulary))))
    made = tag_forms.make_form(form, preprocessing)
    graph = tag_forms.make_graph(weights.model, made, rows, preprocessing["image_size_hw"])
    stated = {} if thresholds is None else {"thresholds": thresholds.of_tags(kept, PER_TAG)}
    metadata = {**weights.metadata, **kept.facts(), **stated, "form": made.model_dump(), "vocabulary": vocabulary.hash}
    path = folder / _TAG_FILES[form]
    difference = export_onnx(graph, metadata, path, config)
    if form == "wd14":
        tag_forms.write_tags(folder, kept, thresholds)
        tag_forms.write_head(folder, graph.network)
    elif form == "imgutils":
        tag_forms.write_imgutils(folder, kept, thresholds, preprocessing)
    else:
        tag_forms.write_mapping(folder, kept)
    write_card(folder, form, path.name, metadata)
    changes = tag_forms.describe_changes(vocabulary, kept)
    return {"file": path.name, "onnx_max_abs_diff": difference, **changes}


def write_timm_tagger(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write a folder for timm whose network takes BGR, as the published taggers do, and selected_tags.csv.

    Mean and standard deviation stay those of red, green and blue: neggles/wdv3-timm normalises, then turns the channels
    round. A backbone takes RGB, as those of every other network do.
    """
    stated = weights.metadata["preprocessing"]
    network = tag_forms.to_bgr(weights.model.network, stated["image_size_hw"])
    metadata = {**weights.metadata, "channel_order": "BGR", "preprocessing": {**stated, "pad": "none"}}  # programs pad
    report = export_folder("timm", network, metadata, folder, config.accepted)
    vocabulary = vocabulary_of(weights.metadata)
    tag_forms.write_tags(folder, vocabulary, find_thresholds(config.thresholds, config.run_dir, vocabulary))
    return report


IMAGE_FORMATS: Mapping[str, Format] = {
    "onnx": write_onnx,
    **{name: partial(write_folder, name) for name in TARGETS},
}
TAG_FORMATS: Mapping[str, Format] = {
    **IMAGE_FORMATS,
    "timm": write_timm_tagger,
    **{form: partial(write_tagger, form) for form in _TAG_FILES},
}
KIND_FORMATS: Mapping[str, Mapping[str, Format]] = {"diffusion": SDXL_FORMATS}  # of kinds that make nothing of an image
FORMATS = {*TAG_FORMATS, *(name for formats in KIND_FORMATS.values() for name in formats)}
_IN_FP16 = {"onnx", *_TAG_FILES, *SDXL_FORMATS}


def find_format(name: str, weights: Weights) -> Format:
    """Return a format of some weights. Raises UserError (`weights`, `format`) where they have none, or not this one."""
    if weights.model is None:
        task = weights.metadata["task"]["name"]
        formats = KIND_FORMATS.get(task, {})
        if not formats:
            raise UserError(f"weights: {weights.path} is of task {task!r}, which has no export")
    else:
        is_tagger = weights.metadata["output"] == "tags" and set(FACTS) <= weights.metadata.keys()
        formats = TAG_FORMATS if is_tagger else IMAGE_FORMATS
    if name not in formats:
        raise UserError(f"format: {name!r} is no format of these weights; {close_names(name, formats)}")
    return formats[name]


def write_export(weights: Weights, folder: Path, config: ExportConfig) -> dict[str, Any]:
    """Write the files of `config.format` into a folder, and return the report.

    Raises UserError (`format`, `tolerance`, `output`); then nothing is written and older files stay.
    """
    write = find_format(config.format, weights)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    with TemporaryDirectory(dir=there, prefix=".export-") as scratch:
        report = write(weights, Path(scratch), config)
        refuse_other_format(folder, report["file"], config.format)
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            place = folder / path.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    return report
