"""The formats that are folders or weight files: what each accepts, writes, and is loaded by to be compared.

| format | files | stems | stages |
|---|---|---|---|
| timm | model.safetensors, config.json | 4 | 4; any network of timm |
| transformers | model.safetensors, config.json, preprocessor_config.json | 2, 4 | any |
| safetensors | model.safetensors, as Atelier writes it | any | any |
| pth | model.pth: the same names and tensors, for torch.load | any | any |
"""

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.export.libraries import (
    Outputs,
    check_timm,
    check_transformers,
    load_timm_folder,
    load_transformers_folder,
    write_timm,
    write_transformers,
)
from models.export.model_card import licence_of, write_card
from models.export.parity import refuse_difference, vary_weights
from models.fcmae import FCMAE
from models.weights.fit import load_into
from utils.io.weights import read_weights, write_weights

Metadata = Mapping[str, Any]
_SAFETENSORS, _PTH = "model.safetensors", "model.pth"
_IMAGES = 4  # that are compared


@dataclass(frozen=True)
class Target:
    """A format.

    check: raises UserError (`format`) for what it cannot express. load: None where our network loads it. holds_decoder:
    it takes an FCMAE whole.
    """

    name: str
    file: str
    check: Callable[[nn.Module, Metadata], None]
    write: Callable[[nn.Module, Metadata, Path], None]
    load: Callable[[Path], Outputs] | None
    holds_decoder: bool = False


def write_safetensors(network: nn.Module, metadata: Metadata, folder: Path) -> None:
    """Write a weight file of ours: the tensors, and metadata that tell how to rebuild the network."""
    write_weights(folder / _SAFETENSORS, network.state_dict(), dict(metadata))


def write_pth(network: nn.Module, metadata: Metadata, folder: Path) -> None:
    """Write the network's state dict: `network.load_state_dict(torch.load(FILE)["model"])`.

    The entry `licence` is there without a licence too: a file of the model alone is presumed to be a released one.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    content = io.BytesIO()  # of a full disk, torch says that a position is unexpected
    torch.save({"model": state, "licence": licence_of(metadata)}, content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _PTH).write_bytes(content.getbuffer())


TARGETS = {
    "timm": Target("timm", "model.safetensors", check_timm, write_timm, load_timm_folder),
    "transformers": Target(
        "transformers", "model.safetensors", check_transformers, write_transformers, load_transformers_folder
    ),
    "safetensors": Target(
        "safetensors", _SAFETENSORS, lambda network, _: None, write_safetensors, None, holds_decoder=True
    ),
    "pth": Target("pth", _PTH, lambda network, _: None, write_pth, None, holds_decoder=True),
}


def export_folder(
    target: Target, network: nn.Module, metadata: Metadata, folder: Path, tolerance: float
) -> dict[str, Any]:
    """Write a format's files into an empty folder and compare them; returns the report.

    A copy with varied weights is tried first: with small weights, a wrong converter gives almost the right outputs.
    Raises UserError (`format`, `tolerance`).
    """
    target.check(network, metadata)
    if any("grn" in name for name, _ in network.named_parameters()):  # a network of timm keeps its tensors as they are
        found, largest = _write_and_compare(target, vary_weights(network), metadata, folder)
        refuse_difference(found / max(largest, 1.0), tolerance, "a copy with varied weights")
    found, _ = _write_and_compare(target, network.eval(), metadata, folder)
    refuse_difference(found, tolerance, "what the target's own network gives")
    write_card(folder, target.name, target.file, metadata)
    return {"file": target.file, "max_abs_diff": found}


@torch.no_grad()
def _write_and_compare(target: Target, network: nn.Module, metadata: Metadata, folder: Path) -> tuple[float, float]:
    """Write a network's files and load them as their users do.

    Returns the greatest difference of the outputs for normalised images of noise, and the greatest output.
    """
    target.write(network, metadata, folder)
    if target.load is None:
        loaded = _outputs(_reload(network, folder / target.file), metadata)
    else:
        loaded = target.load(folder)
    stated = metadata["preprocessing"]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, stated["channels"], *stated["image_size_hw"], generator=draw)
    wanted = _outputs(network, metadata)(images).float()
    return float((wanted - loaded(images).float()).abs().max()), float(wanted.abs().max())


def _outputs(network: nn.Module, metadata: Metadata) -> Outputs:
    """Return what is compared of a network of ours: logits, or the last map of a backbone."""
    encoder = network.encoder if isinstance(network, FCMAE) else network
    compares_maps = metadata["output"] == "features" and hasattr(encoder, "forward_features")
    return encoder.forward_features if compares_maps else encoder


def _reload(network: nn.Module, file: Path) -> nn.Module:
    """Return a network of the same kind with the tensors of a weight file that has its own names."""
    fresh = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    load_into(fresh, read_weights(file, "format")[0], keep_head=True)
    return fresh.eval()
