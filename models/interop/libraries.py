"""Folders that timm and transformers load: model.safetensors with config.json.

timm.create_model("local-dir:FOLDER", pretrained=True)
timm.create_model("convnextv2_atto", num_classes=K, checkpoint_path="FOLDER/model.safetensors")
transformers.AutoModelForImageClassification.from_pretrained("FOLDER")      it builds timm's network
transformers.AutoImageProcessor.from_pretrained("FOLDER")

Source: huggingface/pytorch-image-models:timm/models/_hub.py load_model_config_from_path.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.build import timm_arguments
from models.config import ConvNeXtV2Config, TimmConfig
from models.interop.foreign import CONFIG, OURS
from models.interop.metadata import label_names, licence_entry
from models.interop.parity import refuse_difference, vary_weights
from models.weights.timm_hub import filter_state
from utils.errors import UserError
from utils.formats.preprocessing import Preprocessing
from utils.io.files import Values, write_json
from utils.io.weights import write_tensors

Outputs = Callable[[Tensor], Tensor]  # from normalised images [B, C, H, W] to the outputs to compare
_IMAGES = 4  # to compare


def write_timm_folder(network: nn.Module, metadata: Values, folder: Path) -> None:
    """Write weights and configuration. Raises UserError (`format`) if timm cannot express them."""
    import timm

    images = _state_images(metadata)
    if hasattr(network, "pretrained_cfg"):
        target = network
        state = network.state_dict()
        arguments = timm_arguments(TimmConfig.model_validate(metadata["model"]))
    else:
        shape = ConvNeXtV2Config.model_validate(metadata["model"])
        stages = len(shape.dims)
        if (shape.stem_stride, stages) != (4, 4):  # with patch_size=2, timm's first stage halves the map again
            raise UserError(
                f"format: timm has no ConvNeXt V2 with {stages} stages and a stem of stride {shape.stem_stride}; "
                "set format=onnx or safetensors"
            )
        name = shape.name if shape.name in timm.list_models("convnextv2_*") else "convnextv2_tiny"
        arguments = shape.model_dump(include={"depths", "dims"})
        sizes = {"num_classes": network.num_classes, "in_chans": shape.in_channels}
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            target = timm.create_model(name, **sizes, **arguments)
        width = shape.dims[-1]  # of the final norm, which an encoder lacks
        norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        state = filter_state(target, {**norm, **network.state_dict()})
    own = target.pretrained_cfg
    classes = target.num_classes
    pretrained = {
        "input_size": [images.channels, *images.image_size_hw],
        "mean": images.mean,
        "std": images.std,
        "interpolation": images.interpolation,
        "crop_pct": 1.0 if images.squashes else images.eval_crop,
        "crop_mode": "squash" if images.squashes else "center",
        "fixed_input_size": False,
        "custom_load": False,
        "num_classes": classes,
    }
    pretrained |= {key: own.get(key) for key in ("first_conv", "classifier")} | licence_entry(metadata)
    config = {
        "architecture": own["architecture"],
        "num_features": target.num_features,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
        OURS: {"model": metadata["model"], "preprocessing": metadata["preprocessing"]},
    }
    if names := label_names(metadata):
        config["label_names"] = names
    write_json(folder / CONFIG, config)
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})


def open_timm_folder(folder: Path) -> Outputs:
    """Load a folder in timm; the function returns logits, or a backbone's last feature map."""
    import timm

    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return network if network.num_classes else network.forward_features


def _state_images(metadata: Values) -> Preprocessing:
    """Return the preprocessing; programs pad for taggers. Raises UserError (`format`) if timm prepares otherwise."""
    stated = Preprocessing.model_validate(metadata["preprocessing"])
    height, width = stated.image_size_hw
    if stated.pad != "none" and metadata["output"] != "tags":
        reason = f"do not pad images (augment.pad={stated.pad}); set format=onnx, or train with augment.pad=none"
    elif height != width and not stated.squashes:
        reason = f"crop squares only, not {height} x {width}; set format=onnx, or train with augment.eval_resize=squash"
    else:
        return stated
    raise UserError(f"format: the image transforms of timm {reason}")


def write_compared(network: nn.Module, metadata: Values, folder: Path, tolerance: float) -> float:
    """Write a network's files into an empty folder and load them like their users; return the largest difference.

    A copy with varied weights comes first, because with small weights a wrong converter gives almost the right outputs.
    Raises UserError (`format`, `tolerance`).
    """
    if any("grn" in name for name, _ in network.named_parameters()):  # tensors of timm networks are not converted
        varied = vary_weights(network)
        write_timm_folder(varied, metadata, folder)
        difference, largest = _compare(varied, open_timm_folder(folder), metadata)
        refuse_difference(difference / max(largest, 1.0), tolerance, "a copy with varied weights")
    write_timm_folder(network.eval(), metadata, folder)
    difference, _ = _compare(network, open_timm_folder(folder), metadata)
    refuse_difference(difference, tolerance, "the output of the target's own network")
    return difference


@torch.no_grad()
def _compare(network: nn.Module, loaded: Outputs, metadata: Values) -> tuple[float, float]:
    """Return the largest difference of the outputs for normalised images of noise, and the largest output.

    Outputs are logits, or a backbone's last feature map.
    """
    stated = Preprocessing.model_validate(metadata["preprocessing"])
    images = torch.randn(_IMAGES, stated.channels, *stated.image_size_hw, generator=torch.Generator().manual_seed(0))
    expected = network.forward_features(images) if metadata["output"] == "features" else network(images)
    return float((expected.float() - loaded(images).float()).abs().max()), float(expected.abs().max())
