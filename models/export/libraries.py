"""Folders that timm and transformers load: model.safetensors with config.json, and preprocessor_config.json.

timm.create_model("local-dir:FOLDER", pretrained=True)
timm.create_model("convnextv2_atto", num_classes=K, checkpoint_path="FOLDER/model.safetensors")
transformers.ConvNextV2ForImageClassification.from_pretrained("FOLDER")
transformers.AutoImageProcessor.from_pretrained("FOLDER")

Source: huggingface/pytorch-image-models:timm/models/_hub.py load_model_config_from_path.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.export.model_card import label_names, licence_entry
from models.weights.layouts import Geometry, read_geometry, recognise, translate
from models.weights.timm_hub import filter_state
from utils.errors import UserError
from utils.io.weights import write_tensors

Outputs = Callable[[Tensor], Tensor]  # from normalised images [B, C, H, W] to what is compared
_BASE = "convnextv2_tiny"  # whose builder takes the depths and dims of a size of ours
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def check_timm(network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Raise UserError (`format`) where timm cannot express a network or its preprocessing."""
    preprocessing = metadata["preprocessing"]
    _refuse_padding(preprocessing, "timm")
    height, width = preprocessing["image_size_hw"]
    if height != width and preprocessing.get("eval_resize", "crop") == "crop":
        raise UserError(
            f"format: timm rounds the sides of crops that are not square in another way, and the images here are "
            f"{height} x {width}; set format=onnx, or train with augment.eval_resize=squash"
        )
    # With patch_size=2, timm's first stage halves the map again, which ours does not.
    if not hasattr(network, "pretrained_cfg"):
        _refuse_shape(read_geometry(_official_state(network, "timm")), "timm", (4,))


def write_timm(network: nn.Module, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a network's weights and configuration into a folder."""
    import timm

    config: dict[str, Any]
    if hasattr(network, "pretrained_cfg"):
        state, classes = _with_head_norm(network), network.num_classes
        config = {"architecture": network.pretrained_cfg["architecture"], "num_features": network.num_features}
        if image_size_hw := metadata["model"].get("image_size_hw"):
            config["model_args"] = {"img_size": image_size_hw}
        names = {key: network.pretrained_cfg.get(key) for key in ("first_conv", "classifier")}
    else:
        official = _official_state(network, "timm")
        geometry = read_geometry(official)
        arguments = {} if geometry.size else {"depths": geometry.depths, "dims": geometry.dims}
        name = f"convnextv2_{geometry.size}" if geometry.size else _BASE
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            theirs = timm.create_model(
                name, num_classes=geometry.num_classes, in_chans=geometry.in_channels, **arguments
            )
        state, classes = filter_state(theirs, _with_norm(official)), geometry.num_classes
        config = {"architecture": name, "num_features": geometry.dims[-1], "model_args": arguments}
        names = {"first_conv": "stem.0", "classifier": "head.fc"}
    config["num_classes"] = classes
    if label_names(metadata):
        config["label_names"] = label_names(metadata)
    config["pretrained_cfg"] = {
        **_timm_preprocessing(metadata["preprocessing"]), **names, **licence_entry("license", metadata),
        "num_classes": classes, "custom_load": False, "fixed_input_size": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_timm_folder(folder: Path) -> Outputs:
    """Return logits of the network that timm makes of a folder; of a backbone, the last feature map."""
    import timm

    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return network if network.num_classes else network.forward_features


def _with_head_norm(network: nn.Module) -> dict[str, Tensor]:
    """Return a timm network's tensors; a norm of its head that a backbone lacks gets scale 1 and shift 0."""
    import timm

    state = dict(network.state_dict())
    if network.num_classes == 0:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            whole = timm.create_model(network.pretrained_cfg["architecture"], num_classes=0).state_dict()
        for name in [name for name in whole if name.startswith("head.norm.") and name not in state]:
            state[name] = (torch.ones if name.endswith("weight") else torch.zeros)(whole[name].shape)
    return state


def _timm_preprocessing(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return our preprocessing in timm's words."""
    squashes = ours.get("eval_resize", "crop") == "squash"
    return {
        "input_size": [ours["channels"], *ours["image_size_hw"]],
        "mean": ours["mean"],
        "std": ours["std"],
        "interpolation": "box" if ours["interpolation"] == "area" else ours["interpolation"],
        "crop_pct": 1.0 if squashes else ours["eval_crop"],
        "crop_mode": "squash" if squashes else "center",
    }


# ------------------------------------------------------------------------------------------------------- transformers


def check_transformers(network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Raise UserError (`format`) where transformers cannot express a network or its preprocessing."""
    _refuse_shape(read_geometry(_official_state(network, "transformers")), "transformers", (2, 4), any_stages=True)
    _refuse_padding(metadata["preprocessing"], "transformers")
    _processor(metadata["preprocessing"])


def write_transformers(network: nn.Module, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a network's weights, configuration and image processor into a folder."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ConvNextV2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    official = _official_state(network, "transformers")
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
    state = translate(_with_norm(official), "official", "transformers")
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


# ----------------------------------------------------------------------------------------------------------------- both


def _official_state(network: nn.Module, target: str) -> dict[str, Tensor]:
    """Return a ConvNeXt V2's tensors under official names, ours or timm's.

    Raises UserError (`format`) for another network.
    """
    layout, state = recognise(network.state_dict())
    if layout not in ("official", "timm") or not any(".grn." in name for name in state):
        name = type(network).__name__
        raise UserError(f"format: {target} takes ConvNeXt V2, and not {name}; set format=timm, onnx or safetensors")
    return state


def _with_norm(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the final norm that an encoder lacks and timm and transformers have: scale 1, shift 0."""
    width = read_geometry(official).dims[-1]
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **official}


def _refuse_padding(preprocessing: Mapping[str, Any], library: str) -> None:
    """Raise UserError (`format`) where images are padded first, which a library's transforms do not do as ours."""
    if preprocessing.get("pad", "none") != "none":
        raise UserError(
            f"format: the images were padded before they were resized (augment.pad={preprocessing['pad']}), which "
            f"{library}'s own transforms cannot do; set format=onnx, or train with augment.pad=none"
        )


def _refuse_shape(geometry: Geometry, target: str, strides: tuple[int, ...], *, any_stages: bool = False) -> None:
    """Raise UserError (`format`) for a network whose stem or number of stages a library does not have."""
    if len(geometry.depths) != 4 and not any_stages:
        has, found = "ConvNeXt V2 of four stages", len(geometry.depths)
    elif geometry.stem_stride not in strides:
        has = f"a stem of stride {' or '.join(map(str, strides))}"
        found = "a 3x3 stem" if geometry.stem_stride == 1 else f"a stem of stride {geometry.stem_stride}"
    else:
        return
    raise UserError(
        f"format: {target} has {has} only, and this network has {found}; set format=onnx or safetensors, or "
        "transformers for other numbers of stages and a stem of stride 2"
    )
