"""A folder that timm loads: model.safetensors and config.json.

timm.create_model("local-dir:FOLDER", pretrained=True)
timm.create_model("convnextv2_atto", num_classes=K, checkpoint_path="FOLDER/model.safetensors")

Source: huggingface/pytorch-image-models:timm/models/_hub.py load_model_config_from_path.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.export.geometry import official_state, read_geometry, refuse_padding, refuse_shape, with_norm
from models.export.model_card import label_names, licence_entry
from models.export.parity import Outputs
from models.weights.initialise import to_timm
from utils.errors import UserError
from utils.io.weights import write_tensors

_BASE = "convnextv2_tiny"  # whose builder takes the depths and dims of a size of ours


def check_timm(network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Raise UserError (`format`) where timm cannot express a network or its preprocessing."""
    preprocessing = metadata["preprocessing"]
    refuse_padding(preprocessing, "timm")
    height, width = preprocessing["image_size_hw"]
    if height != width and preprocessing.get("eval_resize", "crop") == "crop":
        raise UserError(
            f"format: timm rounds the sides of crops that are not square in another way, and the images here are "
            f"{height} x {width}; set format=onnx, or train with augment.eval_resize=squash"
        )
    # With patch_size=2, timm's first stage halves the map again, which ours does not.
    if not hasattr(network, "pretrained_cfg"):
        refuse_shape(read_geometry(official_state(network, "timm")), "timm", (4,))


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
        official = official_state(network, "timm")
        geometry = read_geometry(official)
        arguments = {} if geometry.size else {"depths": geometry.depths, "dims": geometry.dims}
        name = f"convnextv2_{geometry.size}" if geometry.size else _BASE
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            theirs = timm.create_model(
                name, num_classes=geometry.num_classes, in_chans=geometry.in_channels, **arguments
            )
        state, classes = to_timm(with_norm(official), theirs), geometry.num_classes
        config = {"architecture": name, "num_features": geometry.dims[-1], "model_args": arguments}
        names = {"first_conv": "stem.0", "classifier": "head.fc"}
    config["num_classes"] = classes
    if label_names(metadata):
        config["label_names"] = label_names(metadata)
    config["pretrained_cfg"] = {
        **_preprocessing(metadata["preprocessing"]), **names, **licence_entry("license", metadata),
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


def _preprocessing(ours: Mapping[str, Any]) -> dict[str, Any]:
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
