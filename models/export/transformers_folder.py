"""A folder that transformers loads: model.safetensors, config.json, preprocessor_config.json.

transformers.ConvNextV2ForImageClassification.from_pretrained("FOLDER")
transformers.AutoImageProcessor.from_pretrained("FOLDER")
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.export.geometry import official_state, read_geometry, refuse_padding, refuse_shape, with_norm
from models.export.model_card import label_names, licence_entry
from models.export.parity import Outputs
from models.weights.layouts import translate
from utils.errors import UserError

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def check_transformers(network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Raise UserError (`format`) where transformers cannot express a network or its preprocessing."""
    refuse_shape(read_geometry(official_state(network, "transformers")), "transformers", (2, 4), any_stages=True)
    refuse_padding(metadata["preprocessing"], "transformers")
    _processor(metadata["preprocessing"])


def write_transformers(network: nn.Module, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a network's weights, configuration and image processor into a folder."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ConvNextV2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    official = official_state(network, "transformers")
    geometry = read_geometry(official)
    names = label_names(metadata)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    config = ConvNextV2Config(
        num_channels=geometry.in_channels,
        patch_size=geometry.stem_stride,
        num_stages=len(geometry.dims),
        hidden_sizes=list(geometry.dims),
        depths=list(geometry.depths),
        layer_norm_eps=1e-6,  # of the final norm, which is 1e-12 by default
        image_size=metadata["preprocessing"]["image_size_hw"][0],
        **(labels if len(labels["label2id"]) == len(names) and names else {"num_labels": geometry.num_classes or 2}),
    )
    config.update(licence_entry("license", metadata))
    if metadata["output"] == "tags":
        config.problem_type = "multi_label_classification"
    state = translate(with_norm(official), "official", "transformers")
    with torch.random.fork_rng(devices=[]):
        theirs = (ConvNextV2ForImageClassification if geometry.num_classes else ConvNextV2Model)(config)
    if not geometry.num_classes:  # a bare backbone has no prefix
        state = {name.removeprefix("convnextv2."): tensor for name, tensor in state.items()}
    theirs.load_state_dict(state, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save_pretrained(folder)
    processor = json.dumps(_processor(metadata["preprocessing"]), indent=2)
    (folder / "preprocessor_config.json").write_text(processor + "\n", encoding="utf-8")


def load_transformers_folder(folder: Path) -> Outputs:
    """Return logits of the network that transformers makes of a folder; of a backbone, the last feature map."""
    from transformers import ConvNextV2ForImageClassification, ConvNextV2Model

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] == ["ConvNextV2Model"]:
        backbone = ConvNextV2Model.from_pretrained(folder, local_files_only=True).eval()
        return lambda images: backbone(images).last_hidden_state
    network = ConvNextV2ForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    return lambda images: network(images).logits


def _processor(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return our preprocessing as an image processor of transformers.

    Raises UserError (`format`) for what its processors do not have: other filters, and a crop that is not square.
    """
    height, width = ours["image_size_hw"]
    if ours["interpolation"] not in _RESAMPLE:
        raise UserError(
            f"format: transformers' image processors resize {' or '.join(_RESAMPLE)} only, and the images here were "
            f"resized {ours['interpolation']}; set format=timm or onnx"
        )
    common = {
        "do_resize": True, "resample": _RESAMPLE[ours["interpolation"]], "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": ours["mean"], "image_std": ours["std"],
        "do_convert_rgb": ours["channels"] == 3,
    }  # fmt: skip
    size = {"height": height, "width": width}
    if ours.get("eval_resize", "crop") == "squash":
        return {"image_processor_type": "ViTImageProcessor", "size": size, **common}
    if height != width:
        raise UserError(
            f"format: transformers' image processors crop squares only, and the images here are {height} x {width}; "
            "set format=timm or onnx, or train with augment.eval_resize=squash"
        )
    edge = {"shortest_edge": math.floor(height / ours["eval_crop"])}
    return {"image_processor_type": "BitImageProcessor", "size": edge, "do_center_crop": True, "crop_size": size,
            **common}  # fmt: skip
