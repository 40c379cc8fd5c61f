"""Files of `torch.save` (.pt, .pth, .bin), read without running code in them."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

_SHOWN_CHARACTERS = 120  # of a name in the file
# torch's reader names what it refuses: `GLOBAL os.system was not an allowed global`, `Trying to call reduce for
# unrecognized function <...>`, `Trying to load unsupported GLOBAL posix.mkdir whose module`.
_REFUSED = re.compile(r"(?:GLOBAL|function) (<[^>]*>|[\w.]+)")


def read_torch(path: Path, key: str) -> dict[str, Tensor]:
    """Return the state dict of a file, bare or under `model` or `state_dict`, on the CPU.

    Raises UserError that begins with `key`: an archive that unpacks to more than its size, pickled objects, no state
    dict, tensors that are sparse, quantised or repeat stored numbers.
    """
    _refuse_bomb(path, key)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch raises KeyError, IndexError, struct.error and more
        if isinstance(error, pickle.UnpicklingError) and (what := _REFUSED.search(str(error))):
            raise UserError(
                f"{key}: {path} holds pickled objects beside tensors, which Atelier never loads: it asks for "
                f"{what.group(1)[:_SHOWN_CHARACTERS]!a}, and nothing of it was run. Use a .safetensors file of these "
                "weights if there is one; if you trust this file, load it in a program of your own and save its state "
                "dict as safetensors"
            ) from None
        # torch's message first advises to turn weights_only off.
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        raise UserError(f"{key}: {path} is not a readable torch file ({said.splitlines()[0]})") from None
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(map(_is_named_tensor, *zip(*content.items()))):
        raise UserError(f"{key}: {path} holds no state dict of tensors but a {type(content).__name__}")
    for name, tensor in content.items():
        # With strides of 0, one number would count as a tensor of any size.
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or _is_repeated(tensor):
            raise UserError(
                f"{key}: {path} holds {str(name)[:_SHOWN_CHARACTERS]!a}, a tensor that is sparse, quantised, without "
                "data, or of more elements than are stored; save plain tensors"
            )
    return content


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
