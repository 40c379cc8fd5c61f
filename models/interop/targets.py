"""The formats that are folders or weight files: how to write each, and how to load it for comparison.

| format | files | stems | stages |
|---|---|---|---|
| timm | model.safetensors, config.json | 4 | 4; any network of timm |
| transformers | model.safetensors, config.json, preprocessor_config.json | 2, 4 | any |
| safetensors | model.safetensors, as Atelier writes it | any | any |
| pth | model.pth: the same names and tensors, for torch.load | any | any |
"""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.fcmae import FCMAE
from models.interop.libraries import Metadata, Outputs, load_timm, load_transformers, write_timm, write_transformers
from models.interop.metadata import licence_of
from models.interop.parity import refuse_difference, vary_weights
from models.weights.fit import load_into
from utils.io.weights import read_weights, write_weights

_IMAGES = 4  # to compare


def write_safetensors(network: nn.Module, metadata: Metadata, folder: Path) -> None:
    """Write a weight file of Atelier: the tensors, and the metadata needed to rebuild the network."""
    write_weights(folder / "model.safetensors", network.state_dict(), dict(metadata))


def write_pth(network: nn.Module, metadata: Metadata, folder: Path) -> None:
    """Write the network's state dict: `network.load_state_dict(torch.load(FILE)["model"])`.

    The entry `license` is always written, because a file with only `model` is presumed to be one of Meta's.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    content = io.BytesIO()  # because torch.save's error for a full disk is misleading
    torch.save({"model": state, "license": licence_of(metadata)}, content)  # noqa: TID251 (tensors and one text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pth").write_bytes(content.getbuffer())


# The functions that write and load a format; None: load the file into our own network.
TARGETS = {
    "timm": (write_timm, load_timm),
    "transformers": (write_transformers, load_transformers),
    "safetensors": (write_safetensors, None),
    "pth": (write_pth, None),
}


def export_folder(form: str, network: nn.Module, metadata: Metadata, folder: Path, tolerance: float) -> dict[str, Any]:
    """Write a format's files into an empty folder, compare them, and return the report.

    A copy with varied weights comes first, because with small weights a wrong converter gives almost the right outputs.
    Raises UserError (`format`, `tolerance`).
    """
    if any("grn" in name for name, _ in network.named_parameters()):  # tensors of timm networks are not converted
        difference, largest = _write_and_compare(form, vary_weights(network), metadata, folder)
        refuse_difference(difference / max(largest, 1.0), tolerance, "a copy with varied weights")
    difference, _ = _write_and_compare(form, network.eval(), metadata, folder)
    refuse_difference(difference, tolerance, "the output of the target's own network")
    return {"file": "model.pth" if form == "pth" else "model.safetensors", "max_abs_diff": difference}


@torch.no_grad()
def _write_and_compare(form: str, network: nn.Module, metadata: Metadata, folder: Path) -> tuple[float, float]:
    """Write a network's files and load them like their users.

    Return the largest difference of the outputs for normalised images of noise, and the largest output.
    """
    write, load = TARGETS[form]
    write(network, metadata, folder)
    if load is None:
        fresh = copy.deepcopy(network)
        for tensor in fresh.state_dict().values():
            tensor.zero_()
        load_into(fresh, read_weights(next(folder.glob("model.*")))[0], keep_head=True)
        loaded = _outputs(fresh.eval(), metadata)
    else:
        loaded = load(folder)
    preprocessing = metadata["preprocessing"]
    random = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, preprocessing["channels"], *preprocessing["image_size_hw"], generator=random)
    expected = _outputs(network, metadata)(images).float()
    return float((expected - loaded(images).float()).abs().max()), float(expected.abs().max())


def _outputs(network: nn.Module, metadata: Metadata) -> Outputs:
    """Return the function to compare for our network: it returns logits, or a backbone's last feature map."""
    encoder = network.encoder if isinstance(network, FCMAE) else network
    compares_maps = metadata["output"] == "features" and hasattr(encoder, "forward_features")
    return encoder.forward_features if compares_maps else encoder
