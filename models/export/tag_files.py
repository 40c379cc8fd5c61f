"""The files beside a tagger's network: which output is which tag, from where on it counts, what is done to an image.

| form | files |
|---|---|
| wd14 | selected_tags.csv in the WD order, inv.npz |
| timm | selected_tags.csv |
| imgutils | selected_tags.csv, categories.json, preprocess.json, thresholds.csv |
| cl_tagger | tag_mapping.json |

The WD order: the four ratings, general tags by descending count, characters by descending count. Programs find tags by
their places in it: kohya-ss/sd-scripts:finetune/tag_images_by_wd14_tagger.py takes outputs 0 to 3 for the ratings, and
pythongosssss/ComfyUI-WD14-Tagger:wd14tagger.py everything from the first character on for characters. So other
categories are skipped, and a place that the vocabulary cannot fill gets an output whose probability is always 0.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from utils.canvas import background_of, background_rgb
from utils.errors import UserError
from utils.io.files import write_json
from utils.record.logging import get_logger
from utils.record.report_files import write_table
from utils.thresholds import FILE as THRESHOLDS
from utils.thresholds import OVERALL, PER_TAG, ThresholdTable
from utils.vocabulary import (
    CATEGORIES,
    CHARACTER,
    FILE,
    GENERAL,
    RATING,
    RATINGS,
    Vocabulary,
    category_name,
    write_vocabulary,
)

log = get_logger(__name__)

SD_SCRIPTS_SIDE = 448  # pixels that sd-scripts resizes images to, whatever a file takes
# Without a general tag or a character, ComfyUI-WD14-Tagger prints the rows of other categories twice.
_PLACEHOLDERS = {GENERAL: "no_general_tag", CHARACTER: "no_character"}


def check_images(form: str, preprocessing: Mapping[str, Any]) -> None:
    """Raise UserError (`format`) for images that no program gives to a form; warn where they are prepared otherwise."""
    height, width = preprocessing["image_size_hw"]
    if preprocessing["channels"] != 3 or (height != width and form != "imgutils"):
        raise UserError(
            f"format: {form} takes square RGB images, and these weights take {height} x {width} px of "
            f"{preprocessing['channels']} channels; set format=onnx"
        )
    if form == "imgutils":
        return
    if height != SD_SCRIPTS_SIDE:
        log.warning(
            "format: sd-scripts resizes images to %d px, and these weights take %d px, so it cannot use them; other "
            "programs can. Train with augment.image_size_hw=[448,448] for it", SD_SCRIPTS_SIDE, height,
        )  # fmt: skip
    if preprocessing.get("pad", "none") != "square" or background_rgb(background_of(preprocessing)) != (255, 255, 255):
        log.warning(
            "format: the programs that read %s pad images to squares on white, and these weights were trained on other "
            "images; expect worse tags than evaluate.py measures (augment.pad=square data.background=white)", form,
        )  # fmt: skip


def to_wd_order(vocabulary: Vocabulary) -> tuple[Vocabulary, list[int]]:
    """Return a vocabulary in the WD order, and the output of each of its rows; -1 for one that is missing."""
    found = [(RATING, name, tag_id, vocabulary.columns.get((RATING, name), -1)) for name, tag_id in RATINGS.items()]
    for category, placeholder in _PLACEHOLDERS.items():
        order = sorted(vocabulary.of_category(category).tolist(), key=lambda row: -vocabulary.counts[row])
        found += [(category, vocabulary.names[row], vocabulary.tag_ids[row], row) for row in order]
        found += [] if order else [(category, placeholder, 0, -1)]
    categories, names, tag_ids, rows = zip(*found)
    counts = tuple(0 if row < 0 else vocabulary.counts[row] for row in rows)
    return Vocabulary(names, categories, counts, tag_ids), list(rows)


def describe_changes(vocabulary: Vocabulary, kept: Vocabulary) -> dict[str, Any]:
    """Return, for the report, how many tags of each category are left out, and the outputs that are always 0."""
    missing = vocabulary.columns.keys() - kept.columns.keys()
    left_out = dict(Counter(category_name(category) for category, _ in sorted(missing)))
    constant = [name for _, name in kept.columns.keys() - vocabulary.columns.keys()]
    if left_out:
        log.info("format: tags left out: %s", left_out)
    if constant:
        log.info("format: rows that programs need and the vocabulary lacks, always 0: %s", ", ".join(sorted(constant)))
    if not any(kept.counts[row] for row in kept.of_category(RATING)):
        log.warning("format: no training image had a rating, so the ratings that programs show mean nothing")
    return {"tags": len(kept), "left_out": left_out, "constant": sorted(constant)}


def write_tags(folder: Path, vocabulary: Vocabulary, thresholds: ThresholdTable | None) -> None:
    """Write selected_tags.csv; with thresholds, they are its column best_threshold."""
    further = {} if thresholds is None else {"best_threshold": thresholds.of_tags(vocabulary, PER_TAG)}
    write_vocabulary(folder / FILE, vocabulary, further)


def write_head(folder: Path, network: nn.Module) -> None:
    """Write inv.npz, the head from an embedding to logits, for imgutils' convert_wd14_emb_to_prediction."""
    head = network.get_classifier()
    weights, bias = (tensor.detach().float().cpu().numpy() for tensor in (head.weight.T, head.bias))
    np.savez(folder / "inv.npz", weights=weights, bias=bias)


def write_imgutils(
    folder: Path, vocabulary: Vocabulary, thresholds: ThresholdTable | None, preprocessing: Mapping[str, Any]
) -> None:
    """Write what imgutils.generic.multilabel_timm_predict reads beside the network."""
    write_tags(folder, vocabulary, thresholds)
    present = [{"category": number, "name": category_name(number)} for number in sorted(set(vocabulary.categories))]
    write_json(folder / "categories.json", present)
    steps = _transforms(preprocessing)
    write_json(folder / "preprocess.json", {"test": steps, "val": steps})
    if thresholds is not None:
        found = thresholds.of_categories("balanced")
        rows = [{**one, "threshold": found.get(one["category"], found[OVERALL])} for one in present]
        write_table(folder / THRESHOLDS, rows)


def _transforms(preprocessing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return our preprocessing as steps of imgutils.preprocess."""
    height, width = preprocessing["image_size_hw"]
    interpolation = preprocessing["interpolation"]
    resize = {"type": "resize", "interpolation": "box" if interpolation == "area" else interpolation}
    crops = preprocessing.get("eval_resize", "crop") == "crop"
    sides = [int(side / preprocessing["eval_crop"]) if crops else side for side in (height, width)]
    colour = background_rgb(background_of(preprocessing)) or (255, 255, 255)
    if preprocessing.get("pad", "none") == "square":
        resize |= {"type": "pad_to_size", "size": sides[::-1], "background_color": list(colour)}
    else:
        resize |= {"size": max(sides) if crops else sides}
    return [
        {"type": "convert_rgb", "force_background": "white"},
        resize,
        *([{"type": "center_crop", "size": [height, width]}] if crops else []),
        {"type": "maybe_to_tensor"},
        {"type": "normalize", "mean": preprocessing["mean"], "std": preprocessing["std"]},
    ]


def write_mapping(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tag_mapping.json; it names no output of a category that sd-scripts refuses."""
    tags = {
        str(row): {"tag": name, "category": category_name(category).title()}
        for row, (category, name) in enumerate(vocabulary.columns)
        if category in CATEGORIES.values()
    }
    write_json(folder / "tag_mapping.json", tags)
