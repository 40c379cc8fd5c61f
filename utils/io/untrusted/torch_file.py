"""Files of `torch.save` (.pt, .pth, .pth.tar, .bin), read without running code in them."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError

_SHOWN_CHARACTERS = 120  # of a name in the file
_SIGNATURES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a ZIP archive; a bare pickle
_SUFFIXES = (".pt", ".pth", ".bin")
# The entries under which trainers keep weights and their average; `model_ema` is that of the official fine-tuning,
# `state_dict_ema` timm's. In `ema_state_dict`, mmengine keeps the weights themselves (`_swap_back`).
ENTRIES = {"model": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema", "ema_state_dict")}
_SAVE_AGAIN = (
    "Use a .safetensors file of these weights if there is one; if you trust this file, load it in a program of your "
    "own and save its state dict as safetensors"
)
_STRIP_MMENGINE = (
    "It is a training checkpoint of mmengine: if you trust it, strip it by mmpretrain's "
    "tools/model_converters/publish_model.py IN_FILE OUT_FILE, and give the file that this writes; it holds the "
    "average where there is one, and the weights themselves with --no-ema"
)
# torch's reader names what it refuses: `GLOBAL os.system was not an allowed global`, `Trying to call reduce for
# unrecognized function <...>`, `Trying to load unsupported GLOBAL posix.mkdir whose module`.
_REFUSED = re.compile(r"(?:GLOBAL|function) (<[^>]*>|[\w.]+)")


class TorchContent(NamedTuple):
    """A state dict; the names of all entries of the file that it was one of, and its entry `licence` (export.py's)."""

    tensors: dict[str, Tensor]
    entries: tuple[str, ...] = ()
    licence: str | None = None


def is_torch_file(path: Path) -> bool:
    """Tell from its first bytes whether a file is one of `torch.save`; of unknown bytes the ending decides."""
    try:
        with open(path, "rb") as stream:
            size, first = os.fstat(stream.fileno()).st_size, stream.read(9)
    except OSError:
        return False
    begins_a_header = first[8:] == b"{"  # of safetensors
    # The length of such a header may have the bytes of a signature: 640 is \x80\x02.
    if begins_a_header and int.from_bytes(first[:8], "little") <= size - 8:
        return False
    return first.startswith(_SIGNATURES) or (path.suffix in _SUFFIXES and not begins_a_header)


def read_torch(path: Path, key: str, which: str = "model") -> TorchContent:
    """Return the state dict of a file, on the CPU: bare, or the weights or the average (`ema`) of a checkpoint.

    Beside tensors and plain values, a file may hold an `argparse.Namespace`, as training scripts save their arguments;
    it is ignored. Raises UserError that begins with `key`: an archive that unpacks to more than its size, other pickled
    objects, no state dict, no average, tensors that are sparse, quantised or repeat stored numbers.
    """
    _refuse_bomb(path, key)
    try:
        # By its content: torch reads a path that ends in .safetensors by another reader.
        with open(path, "rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch raises KeyError, IndexError, struct.error and more
        if isinstance(error, pickle.UnpicklingError) and (what := _REFUSED.search(str(error))):
            advice = _STRIP_MMENGINE if what.group(1).startswith("mmengine.") else _SAVE_AGAIN
            raise UserError(
                f"{key}: {path} holds pickled objects beside tensors, which Atelier never loads: it asks for "
                f"{what.group(1)[:_SHOWN_CHARACTERS]!a}, and nothing of it was run. {advice}"
            ) from None
        # torch's message first advises to turn weights_only off.
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise UserError(f"{key}: {path} is not a readable torch file ({said.splitlines()[0]})") from None
    entries: tuple[str, ...] = ()
    licence = None
    if isinstance(content, dict):
        content = _swap_back(content)
        states = [name for names in ENTRIES.values() for name in names if isinstance(content.get(name), dict)]
        chosen = next((name for name in ENTRIES[which] if name in states), None)
        if chosen is None and which == "ema":
            raise UserError(
                f"init_weights: ema, but {path} holds no average beside its weights (found: "
                f"{', '.join(states) or 'a bare state dict'}); set init_weights=model"
            )
        if chosen is not None or states:
            entries = tuple(str(name)[:_SHOWN_CHARACTERS] for name in content)
            licence = content.get("licence")
            content = content[chosen or states[0]]
    if not isinstance(content, dict) or not content or not all(map(_is_named_tensor, *zip(*content.items()))):
        raise UserError(f"{key}: {path} holds no state dict of tensors but a {type(content).__name__}")
    for name, tensor in content.items():
        # With strides of 0, one number would count as a tensor of any size.
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or _is_repeated(tensor):
            raise UserError(
                f"{key}: {path} holds {str(name)[:_SHOWN_CHARACTERS]!a}, a tensor that is sparse, quantised, without "
                "data, or of more elements than are stored; save plain tensors"
            )
    return TorchContent(content, entries, licence[:_SHOWN_CHARACTERS] if isinstance(licence, str) else None)


def _swap_back(content: dict[Any, Any]) -> dict[Any, Any]:
    """Return a checkpoint of mmengine's EMAHook with the weights in `state_dict` and the average in `ema_state_dict`.

    The hook swaps the two when it saves, so that `state_dict` is the average; the weights keep the prefix `module.` of
    the averaging wrapper, whose own tensors (`steps`) have none. Another content is returned as it is.
    Source: open-mmlab/mmengine:mmengine/hooks/ema_hook.py `_swap_ema_state_dict`.
    """
    average, wrapped = content.get("state_dict"), content.get("ema_state_dict")
    if not isinstance(average, dict) or not isinstance(wrapped, dict):
        return content
    weights = {
        name.removeprefix("module."): tensor
        for name, tensor in wrapped.items()
        if isinstance(name, str) and name.startswith("module.") and name.removeprefix("module.") in average
    }
    return {**content, "state_dict": weights, "ema_state_dict": average} if weights else content


def _is_named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _is_repeated(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _refuse_bomb(path: Path, key: str) -> None:
    """Raise UserError where a torch archive unpacks to more than the file's size: torch itself never compresses."""
    if not zipfile.is_zipfile(path):
        return  # torch's older format, or none
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{key}: {path} is not a readable torch file ({str(error) or type(error).__name__})") from None
    if unpacked > path.stat().st_size:
        raise UserError(
            f"{key}: {path} has {path.stat().st_size:,} bytes and unpacks to {unpacked:,}; torch never compresses "
            "its files, so another program made this one, and it is not read. Get the original file"
        )
