"""Files of `torch.save` (.pt, .pth, .pth.tar, .bin), read without running code in them."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

_SHOWN_CHARACTERS = 120  # of a name or a reason in the file
# The entries under which trainers keep weights and their average; `model_ema` is that of the official fine-tuning,
# `state_dict_ema` timm's.
ENTRIES = {"model": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}


def read_torch(path: Path, which: str = "model") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict of a file, on the CPU: bare, or the weights or the average (`ema`) of a checkpoint.

    With it, of a checkpoint, the names of its `entries`, and its `licence`, which export.py writes, as `origin`. Beside
    tensors and plain values, a file may hold an `argparse.Namespace`, as training scripts save their arguments; it is
    ignored. Raises UserError for other pickled objects, damage, what is no state dict of plain tensors, and where there
    is no average (`init_weights`).
    """
    try:
        # By its content: torch reads a path that ends in .safetensors by another reader.
        with open(path, "rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(stream, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # on a damaged file torch raises KeyError, IndexError, struct.error and more
        # torch's message begins with the advice to turn weights_only off.
        lines = [line for line in str(error).splitlines() if line.strip() and "`weights_only`" not in line]
        reason = next((line for line in lines if "GLOBAL" in line or "function" in line), (lines or ["damaged"])[0])
        reason = reason.rpartition("WeightsUnpickler error:")[2].strip()[:_SHOWN_CHARACTERS]
        raise UserError(
            f"{path} is not a readable torch file of tensors alone, and no code in it was run ({reason}); give a "
            ".safetensors file of these weights"
        ) from None
    metadata: dict[str, Any] = {}
    if isinstance(content, dict):
        states = [name for names in ENTRIES.values() for name in names if isinstance(content.get(name), dict)]
        chosen = next((name for name in ENTRIES[which] if name in states), None)
        if chosen is None and which == "ema":
            raise UserError(
                f"init_weights: ema, but {path} holds no average beside its weights (found: "
                f"{', '.join(states) or 'a bare state dict'}); set init_weights=model"
            )
        if states:
            metadata["entries"] = [str(name)[:_SHOWN_CHARACTERS] for name in content]
            if isinstance(licence := content.get("licence"), str):
                metadata["origin"] = {"licence": licence[:_SHOWN_CHARACTERS]}
            content = content[chosen or states[0]]
    if not isinstance(content, dict) or not content or not all(map(_is_plain, content.keys(), content.values())):
        raise UserError(f"{path} holds no state dict of plain tensors but a {type(content).__name__}")
    return content, metadata


def _is_plain(name: Any, tensor: Any) -> bool:
    """Tell whether an entry is a named tensor that is dense and stored whole: strides of 0 repeat one number."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return is_dense and tensor.nbytes <= tensor.untyped_storage().nbytes()
