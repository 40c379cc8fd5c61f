"""Write the files of an export (export.py), and the formats of networks for images.

A format is a function of (weights, folder, config) that returns a report. It writes into an empty folder and compares
the files with PyTorch. Only then are they moved to their place. Libraries are imported where they are used.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory

from engine.exports.card import Card
from engine.exports.config import FORMATS, ExportConfig, Format
from engine.exports.opened_task import OpenedTask
from engine.judging.quantised import quantise
from models.interop import libraries, page, tag_forms
from models.interop.metadata import dict_of
from models.interop.onnx_file import write_onnx
from models.weights.fit import reverse_channels
from utils.errors import UserError, about
from utils.formats.preprocessing import Preprocessing
from utils.formats.thresholds import PER_TAG, ThresholdTable, find_thresholds
from utils.formats.vocabulary import vocabulary_of
from utils.io.files import Json, readable
from utils.io.weights import write_weights

_SCRATCH = ".export-"
Entry = Json  # of export.json

# ------------------------------------------------------------------------------------------------ networks for images


def export_onnx(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write an ONNX file. An int8 file is made from a float32 file, which is compared with PyTorch."""
    precision = config.precision
    path = folder / ("model.onnx" if precision == "fp32" else f"model_{precision}.onnx")
    difference = write_onnx(weights.model, weights.metadata, path, precision, config.accepted)
    report = {"file": path.name, "onnx_max_abs_diff": difference}
    if precision == "int8":
        report["measured"] = quantise(config, path)
    return report


def export_page(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write an HTML file that runs the network in a browser."""
    with TemporaryDirectory() as scratch:
        report = export_onnx(weights, Path(scratch), config)
        page.fill_page(folder / "page.html", Path(scratch, report.pop("file")), weights.title)
    return report


def export_timm(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write a folder of timm. A tagger has the outputs and selected_tags.csv of wd14.

    Taggers of timm take BGR, like the published taggers. Mean and standard deviation keep the order red, green, blue:
    neggles/wdv3-timm normalises, then reverses the channels. All other networks take RGB.
    """
    network = weights.model.network
    metadata = weights.metadata
    report = {}
    if weights.model.output.has_tags:
        vocabulary = vocabulary_of(metadata)
        kept, rows = tag_forms.to_wd_order(vocabulary)
        network = tag_forms.reorder_head(network, rows)
        with about("format"):
            reverse_channels(network)
        metadata = {**metadata, **kept.facts()}
        tag_forms.write_tags(folder, kept, _thresholds(weights, config))
        report = tag_forms.describe_changes(vocabulary, kept)
    report["max_abs_diff"] = libraries.write_compared(network, metadata, folder, config.accepted)
    return report


def export_safetensors(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write a weight file of Atelier: the tensors, and the metadata needed to rebuild the network."""
    write_weights(folder / "model.safetensors", weights.whole.state_dict(), weights.metadata)
    return {}


def export_wd14(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write an ONNX file in the WD form (models/interop/tag_forms.py), and the form's other files."""
    vocabulary = vocabulary_of(weights.metadata)
    stated = Preprocessing.model_validate(weights.metadata["preprocessing"])
    tag_forms.check_images(stated)
    thresholds = _thresholds(weights, config)
    kept, rows = tag_forms.to_wd_order(vocabulary)
    graph = tag_forms.make_graph(weights.model, rows, stated.image_size_hw)
    metadata = {**weights.metadata, **kept.facts(), "form": tag_forms.WD_FORM.model_dump()}
    if thresholds is not None:
        metadata["thresholds"] = thresholds.of_tags(kept, PER_TAG)
    difference = write_onnx(graph, metadata, folder / FORMATS["wd14"].file, config.precision, config.accepted)
    tag_forms.write_tags(folder, kept, thresholds)
    tag_forms.write_head(folder, graph.network)
    return {"onnx_max_abs_diff": difference, **tag_forms.describe_changes(vocabulary, kept)}


def export_repository(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write a folder for all programs: the files of timm and of wd14, which share selected_tags.csv."""
    return {**export_timm(weights, folder, config), **export_wd14(weights, folder, config)}


def _thresholds(weights: OpenedTask, config: ExportConfig) -> ThresholdTable | None:
    return find_thresholds(config.thresholds, weights.path, weights.metadata.get("weights_hash"))


def given_facts(weights: OpenedTask, config: ExportConfig) -> dict[str, str | None]:
    """Return the user's facts. The default of `trigger` is the trigger of the run."""
    return {
        "author": config.author,
        "description": config.description,
        "trigger": config.trigger or dict_of(weights.metadata, "trained_on").get("trigger"),
    }


def find_format(name: str, weights: OpenedTask) -> Format:
    """Return the row of a format. Raises UserError (`format`) if the weights do not support it."""
    fitting = [other for other, row in FORMATS.items() if weights.subject in row.of]
    if name not in fitting:
        raise UserError(f"format: {name} is no format of {weights.path}; it supports {', '.join(fitting) or 'none'}")
    return FORMATS[name]


def write_export(weights: OpenedTask, folder: Path, config: ExportConfig) -> Entry:
    """Write the files of `config.format` into a folder, and return the report.

    Raises UserError (`format`, `tolerance`, `output`). Then nothing is written and older files stay.
    """
    row = find_format(config.format, weights)
    thresholds = _thresholds(weights, config)
    if thresholds is not None and weights.subject in ("tags", "classes"):
        if weights.subject == "tags":
            least = thresholds.of_tags(vocabulary_of(weights.metadata), PER_TAG)
        else:
            least = [thresholds.rows[0].threshold] * len(weights.metadata["class_names"])
        weights = replace(weights, metadata={**weights.metadata, "thresholds": least})
    more = ""
    if config.card is not None:
        with about("card"), readable(Path(config.card), "Markdown"):
            more = Path(config.card).read_text(encoding="utf-8")
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    for leftover in folder.glob(f"{_SCRATCH}*"):  # of a killed export
        shutil.rmtree(leftover)
    with TemporaryDirectory(dir=parent, prefix=_SCRATCH) as scratch:
        report = {"file": row.file, **resolve_name(row.write)(weights, Path(scratch), config)}
        facts = given_facts(weights, config) | {"measured": report.get("measured")}
        card = Card(weights, config.format, row, report["file"], config.run_dir, thresholds, facts)
        card.write(Path(scratch), more)
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        report["files"] = [path.relative_to(scratch).as_posix() for path in paths]
        for path in paths:
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return report
