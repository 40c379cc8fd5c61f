"""The exports of a tagger: those of every network on images, and the forms that programs for taggers read."""

from functools import partial
from pathlib import Path
from typing import Any

from engine.tasks.image_exports import IMAGE_EXPORTS, TOLERANCES, write_folder
from engine.tasks.kind import Export, ExportSettings, Opened
from utils.errors import UserError
from utils.thresholds import PER_TAG
from utils.vocabulary import vocabulary_of

_FILES = {"wd14": "model.onnx", "imgutils": "model.onnx", "cl_tagger": "model_optimized.onnx"}


def write_tagger(form: str, opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    """Write an ONNX file in one of the forms of models/export/tag_graph.py, and what lies beside it."""
    from models.export import tag_files
    from models.export.model_card import write_card
    from models.export.onnx_file import OnnxSettings, export_onnx
    from models.export.tag_graph import make_form, make_graph

    precision, thresholds, preprocessing = settings.precision, settings.thresholds, opened.metadata["preprocessing"]
    if precision == "int8":
        raise UserError(f"precision: int8 is for format=onnx, and not for {form}; set fp32 or fp16")
    if opened.metadata["output"] != "tags":
        raise UserError(f"backbone_only: true, but {form} holds a tagger with its head; set false, or format=onnx")
    tag_files.check_images(form, preprocessing)
    vocabulary = vocabulary_of(opened.metadata)
    kept, rows = tag_files.to_wd_order(vocabulary) if form == "wd14" else (vocabulary, list(range(len(vocabulary))))
    made = make_form(form, preprocessing)
    graph = make_graph(opened.model, made, rows, preprocessing["image_size_hw"])
    stated = {} if thresholds is None else {"thresholds": thresholds.of_tags(kept, PER_TAG)}
    metadata = {**opened.metadata, **kept.facts(), **stated, "form": made.model_dump(), "vocabulary": vocabulary.hash}
    path = folder / _FILES[form]
    written = OnnxSettings(precision, tolerance=settings.tolerance or TOLERANCES[precision])
    difference = export_onnx(graph, metadata, path, written)
    if form == "wd14":
        tag_files.write_tags(folder, kept, thresholds)
        tag_files.write_head(folder, graph.network)
    elif form == "imgutils":
        tag_files.write_imgutils(folder, kept, thresholds, preprocessing)
    else:
        tag_files.write_mapping(folder, kept)
    write_card(folder, form, path.name, metadata)
    changes = tag_files.describe_changes(vocabulary, kept)
    return {"file": path.name, "onnx_max_abs_diff": difference, **changes}


def write_timm_tagger(opened: Opened, folder: Path, settings: ExportSettings) -> dict[str, Any]:
    """Write a folder for timm whose network takes BGR, as the published taggers do, and selected_tags.csv.

    Mean and standard deviation stay those of red, green and blue: neggles/wdv3-timm normalises, then turns the channels
    round. A backbone takes RGB, as those of every other network do.
    """
    from models.export import tag_files
    from models.export.tag_graph import to_bgr

    if opened.metadata["output"] != "tags":
        return write_folder("timm", opened, folder, settings)
    preprocessing = {**opened.metadata["preprocessing"], "pad": "none"}  # the programs pad the image, not timm
    model = opened.model.with_network(to_bgr(opened.model.network, preprocessing["image_size_hw"]))
    metadata = {**opened.metadata, "preprocessing": preprocessing, "channel_order": "BGR"}
    turned = opened._replace(model=model, metadata=metadata)
    report = write_folder("timm", turned, folder, settings)
    tag_files.write_tags(folder, vocabulary_of(opened.metadata), settings.thresholds)
    return report


TAG_EXPORTS = {
    **IMAGE_EXPORTS,
    "timm": Export(IMAGE_EXPORTS["timm"].file, write_timm_tagger),
    **{
        form: Export(lambda _, file=file: file, partial(write_tagger, form), frozenset({"precision"}))
        for form, file in _FILES.items()
    },
}
