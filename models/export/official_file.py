"""Files that the official ConvNeXt V2 code loads: dense for its fine-tuning, MinkowskiEngine's for its pretraining.

| file | loaded by |
|---|---|
| official, a classifier | main_finetune.py --resume FILE --eval True: GRN is (1, 1, 1, C) |
| official, a backbone | main_finetune.py --finetune FILE: GRN is (1, C), to which its converter adds two axes |
| minkowski | main_pretrain.py --resume FILE, from the FCMAE of a pretraining run |

The official networks are no package, and MinkowskiEngine cannot be built today. So a file is compared after reading it
back into our network, which carries the published names and equals the official one up to rounding.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.export.geometry import official_state, read_geometry, refuse_shape
from models.export.model_card import licence_of
from models.export.parity import Outputs
from models.fcmae import FCMAE
from models.weights.fit import fit_state
from models.weights.layouts import recognise
from models.weights.minkowski import from_dense
from utils.io.weights import read_weights

FILE = "model.pth"


def check_official(network: nn.Module, target: str) -> None:
    """Raise UserError (`format`) where the official code has no such network."""
    refuse_shape(read_geometry(_backbone_state(network, target)), f"the {target} layout", (4,))


def write_official(network: nn.Module, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a dense checkpoint."""
    state = official_state(network, "official")
    if "head.weight" not in state:
        state = {name: tensor.reshape(1, -1) if ".grn." in name else tensor for name, tensor in state.items()}
    save_pth(state, metadata, folder)


def write_minkowski(network: nn.Module, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint of the official pretraining: an FCMAE whole, or the encoder of another network."""
    if isinstance(network, FCMAE):
        state = dict(network.state_dict())
    else:
        backbone = _backbone_state(network, "minkowski")
        state = {f"encoder.{n}": t for n, t in backbone.items() if not n.startswith(("norm.", "head."))}
    save_pth(from_dense(state), metadata, folder)


def load_official(folder: Path) -> Outputs:
    """Return logits, or the feature map of an encoder, of the network that a file's tensors make."""
    tensors, _ = read_weights(folder / FILE, "format")
    state = recognise(tensors).state
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")} or state
    network = read_geometry(encoder).build().eval()
    fit = fit_state(network, state, keep_head=True)
    network.load_state_dict(fit.given, strict=not fit.left)
    return network if network.num_classes else network.forward_features


def _backbone_state(network: nn.Module, target: str) -> dict[str, Tensor]:
    return official_state(network.encoder if isinstance(network, FCMAE) else network, target)


def save_pth(state: Mapping[str, Tensor], metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tensors and the licence for torch.load, without anything that weights_only refuses.

    The entry `licence` is there without a licence too: a file of the model alone is presumed to be a released one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    content = io.BytesIO()  # of a full disk, torch says that a position is unexpected
    torch.save({"model": plain, "licence": licence_of(metadata)}, content)
    (folder / FILE).write_bytes(content.getbuffer())
