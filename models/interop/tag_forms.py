"""Taggers in the form that other programs read: input, outputs, order of the tags, and further files.

| format | input | outputs | files |
|---|---|---|---|
| wd14 | `input` [B, H, W, 3], BGR, 0 to 255 | `output` (probabilities), `embedding` | selected_tags.csv, inv.npz |
| timm | a folder of timm whose network takes BGR, with the rows of wd14 | | selected_tags.csv |
| wd_repository | the files of timm and wd14 together | | one selected_tags.csv |

The embedding [B, D] is the head's input (timm's `pre_logits`). Normalisation, order of channels and layout are inside
the graph.

The WD order: the four ratings, general tags by descending count, characters by descending count. Programs rely on
positions: kohya-ss/sd-scripts:finetune/tag_images_by_wd14_tagger.py reads outputs 0 to 3 as the ratings, and
pythongosssss/ComfyUI-WD14-Tagger:wd14tagger.py reads everything from the first character on as characters. So other
categories are skipped, and a position without a tag in the vocabulary gets an output whose probability is always 0.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.image_model import ImageModel, output_layers
from models.interop.parity import refuse_difference, vary_weights
from models.onnx_form import OnnxForm
from utils.errors import UserError
from utils.formats.preprocessing import Preprocessing
from utils.formats.spelling import CHARACTER, GENERAL, RATING, RATINGS, category_name
from utils.formats.thresholds import PER_TAG, ThresholdTable
from utils.formats.vocabulary import FILE, Vocabulary, write_vocabulary
from utils.io.files import Json
from utils.record.logging import log

SD_SCRIPTS_SIDE = 448  # pixels; sd-scripts always resizes images to this side
# Without a general tag or a character, ComfyUI-WD14-Tagger prints the rows of other categories twice.
_PLACEHOLDERS = {GENERAL: "no_general_tag", CHARACTER: "no_character"}
_NEVER = -1e4  # the logit of an output that the vocabulary lacks; its sigmoid is 0 in float32, and fp16 holds it
_TOLERANCE = 1e-4  # for probabilities of two forms of one network in PyTorch
WD_FORM = OnnxForm(input="input", layout="NHWC", channels="BGR", white=255.0,
                   outputs={"output": "probs", "embedding": "embedding"})  # fmt: skip


@torch.no_grad()
def reorder_head(network: nn.Module, rows: Sequence[int]) -> nn.Module:
    """Return a copy of a network whose output i is output `rows[i]`; for -1, its probability is always 0.

    Raises UserError (`format`) if the network does not end in linear layers.
    """
    reordered = copy.deepcopy(network)
    present = torch.tensor(rows).clamp_min(0)
    absent = torch.tensor(rows) < 0
    for head in output_layers(reordered, "format", "set format=onnx or safetensors").values():
        head.weight = nn.Parameter(head.weight[present].index_fill(0, absent.nonzero().flatten(), 0.0))
        head.bias = nn.Parameter(head.bias[present].masked_fill(absent, _NEVER))
        setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(rows))
    reordered.num_classes = len(rows)
    return reordered


@torch.no_grad()
def make_graph(model: ImageModel, rows: Sequence[int], image_size_hw: Sequence[int]) -> ImageModel:
    """Return a tagger in the WD form; its output i is the model's output `rows[i]` (`reorder_head`).

    It is compared with the model, also with varied weights. Raises UserError (`tolerance`) if they differ.
    """
    images = torch.rand(2, 3, *image_size_hw, generator=torch.Generator().manual_seed(0))
    for tagger in (model.with_network(vary_weights(model.network)), model):
        graph = ImageModel(reorder_head(tagger.network, rows), tagger.normalise, "tags", WD_FORM).eval()
        expected = tagger(images)[1][:, list(rows)].masked_fill(torch.tensor(rows) < 0, 0.0)
        probs, _ = graph(WD_FORM.to_input(images))
        refuse_difference(float((probs - expected).abs().max()), _TOLERANCE, "the network split at its embedding")
    return graph


# ------------------------------------------------------------------------------------------------------- further files


def check_images(stated: Preprocessing) -> None:
    """Raise UserError (`format`) if no program supports the images; warn if programs prepare them differently."""
    height, width = stated.image_size_hw
    if stated.channels != 3 or height != width:
        raise UserError(
            f"format: wd14 takes square RGB images, but these weights take {height} x {width} px with "
            f"{stated.channels} channels; set format=onnx"
        )
    if height != SD_SCRIPTS_SIDE:
        log.warning("format: sd-scripts resizes images to %d px, but these weights take %d px", SD_SCRIPTS_SIDE, height)
    if stated.pad != "square" or stated.colour != (255, 255, 255):
        log.warning(
            "format: programs that read wd14 pad images to white squares, but training did not; expect worse tags than "
            "evaluate.py measures (augment.pad=square data.background=white)"
        )


def to_wd_order(vocabulary: Vocabulary) -> tuple[Vocabulary, list[int]]:
    """Return a vocabulary in the WD order, and for each of its rows the model's output, or -1 if it has none."""
    tags = [(RATING, name, tag_id, vocabulary.columns.get((RATING, name), -1)) for name, tag_id in RATINGS.items()]
    for category, placeholder in _PLACEHOLDERS.items():
        order = sorted(vocabulary.of_category(category).tolist(), key=lambda row: -vocabulary.counts[row])
        tags += [(category, vocabulary.names[row], vocabulary.tag_ids[row], row) for row in order]
        tags += [] if order else [(category, placeholder, 0, -1)]
    categories, names, tag_ids, rows = zip(*tags)
    counts = tuple(0 if row < 0 else vocabulary.counts[row] for row in rows)
    return Vocabulary(names, categories, counts, tag_ids), list(rows)


def describe_changes(vocabulary: Vocabulary, kept: Vocabulary) -> Json:
    """Return, for the report, the number of skipped tags per category, and the outputs that are always 0."""
    missing = vocabulary.columns.keys() - kept.columns.keys()
    skipped = dict(Counter(category_name(category) for category, _ in sorted(missing)))
    constant = [name for _, name in kept.columns.keys() - vocabulary.columns.keys()]
    if not any(kept.counts[row] for row in kept.of_category(RATING)):
        log.warning("format: no training image had a rating, so the ratings in other programs mean nothing")
    return {"tags": len(kept), "left_out": skipped, "constant": sorted(constant)}


def write_tags(folder: Path, vocabulary: Vocabulary, thresholds: ThresholdTable | None) -> None:
    """Write selected_tags.csv, with thresholds in its column best_threshold."""
    further = {} if thresholds is None else {"best_threshold": thresholds.of_tags(vocabulary, PER_TAG)}
    write_vocabulary(folder / FILE, vocabulary, further)


def write_head(folder: Path, network: nn.Module) -> None:
    """Write the head (from an embedding to logits) to inv.npz, for imgutils' convert_wd14_emb_to_prediction.

    Networks whose head is more than one linear layer have no such file.
    """
    head = network.get_classifier()
    if isinstance(head, nn.Linear | nn.Conv2d):
        weights, bias = (one.detach().float().cpu().numpy() for one in (head.weight.flatten(1).T, head.bias))
        np.savez(folder / "inv.npz", weights=weights, bias=bias)
