"""Weight files: safetensors that can be used alone, and foreign files read without unpickling code."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import distributed
from utils.errors import UserError
from utils.files import fsync_path, write_atomically


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, none sharing memory with another."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = (
            tensor.clone() if pointer in seen or tensor.nbytes != tensor.untyped_storage().nbytes() else tensor
        )
        seen.add(pointer)
    return plain


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file and flush it to the disk."""
    save_file(_plain(tensors), path, metadata=dict(metadata or {}))
    fsync_path(path)


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a weight file on rank 0; its metadata says model, preprocessing, classes and step."""
    text = {"atelier": json.dumps(metadata)}
    if distributed.is_main():
        write_atomically(path, lambda temporary: write_tensors(temporary, tensors, text))


def read_weights(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weight file: its tensors, and the metadata that Atelier wrote (`{}` for a foreign file).

    `.pt`, `.pth` and `.bin` are read by torch with weights_only, so no code in them runs. Raises UserError that begins
    with `key`, the configuration key that named the file.
    """
    if not path.is_file():
        raise UserError(f"{key}: {path} does not exist; name a run folder or a weight file")
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path, key), {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("atelier", "{}"))
        return load_file(path), metadata
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{key}: {path} is no readable safetensors file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_torch(path: Path, key: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file brings torch's reader to KeyError, IndexError, struct.error and more
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{key}: {path} holds pickled objects beside tensors, which Atelier never loads; where you trust it, "
                "save its state dict as safetensors"
            ) from None
        raise UserError(f"{key}: {path} is no readable torch file ({_first_line(error)})") from None
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{key}: {path} holds no state dict of tensors but a {type(content).__name__}")
    return content


def find_weights(run_or_file: str, which: str, key: str) -> Path:
    """Return a weight file: the file itself, or weights/<which>_weights.safetensors of a run folder.

    Raises UserError that begins with `key` and lists what the run has.
    """
    path = Path(run_or_file)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{key}: {path} does not exist; name a run folder or a weight file")
        return path
    file = path / "weights" / f"{which}_weights.safetensors"
    if not file.is_file():
        there = sorted(found.name.removesuffix("_weights.safetensors") for found in path.glob("weights/*_weights.*"))
        raise UserError(
            f"{key}: the run {path} has no {which} weights; "
            + (f"it has {', '.join(there)}" if there else "is it a run folder that has saved a checkpoint?")
        )
    return file


def choose_weights(run_dir: str, weights: str) -> Path:
    """Return the weights of a run by their name (best, last, ema), or the file or run that `weights` names itself."""
    if weights in ("best", "last", "ema"):
        return find_weights(run_dir, weights, "weights" if Path(run_dir).is_dir() else "run_dir")
    return find_weights(weights, "best", "weights")
