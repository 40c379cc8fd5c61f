"""Read and write weight files: self-contained safetensors; foreign files are read without running pickled code."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.config.versions import read_saved
from utils.contracts import State, Tensors
from utils.errors import UserError
from utils.io.files import Json, fsync_path, readable, write_atomically

_CHECKSUM = "atelier_sha256"
_TYPES = "atelier_types"  # of the tensors: a converter that keeps the header changes them
_PLACE = re.compile(r"(?:/|~/|\.\./)[^\n]*/[^\n]*")
_SHOWN_CHARACTERS = 120  # of a name or an error
# The keys of weights and of their average in checkpoints: the official fine-tuning's (`model`) and timm's.
ENTRIES = {"model": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors into a safetensors file, with the mode of any new file, and flush it to the disk."""
    plain = {}  # on the CPU, contiguous, without shared memory
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    path.touch()
    mode = path.stat().st_mode
    save_file(plain, path, metadata=dict(metadata or {}))  # as a new file that only its owner can read
    path.chmod(mode)
    fsync_path(path)


def write_weights(path: Path, tensors: Tensors, metadata: Json) -> str:
    """Write a weight file, and return the checksum of its tensors.

    metadata: model, preprocessing, classes, step and more.
    """
    texts = weight_metadata(metadata, tensors)
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, texts))
    return texts[_CHECKSUM]


def weight_metadata(metadata: Json, tensors: Tensors) -> dict[str, str]:
    """Return metadata for a safetensors header: JSON under `atelier`, and the tensors' checksum and types.

    Of a path, only the name: the file may be given to others. `restore_paths` finds the path again.
    """
    return {
        "atelier": json.dumps(_without_folders(metadata)),
        _CHECKSUM: hash_tensors(tensors),
        _TYPES: _types(tensors),
    }


def _types(tensors: Tensors) -> str:
    return " ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))


def _without_folders(value: Any) -> Any:
    """Return nested dictionaries with the name alone of each path that begins at a root, a home or above."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    return Path(value).name if _PLACE.fullmatch(str(value)) else value


def restore_paths(value: Any, known: Any) -> Any:
    """Return metadata of a weight file with the paths that its run's configuration has for the names in it."""
    if isinstance(value, dict) and isinstance(known, dict):
        return {key: restore_paths(inner, known.get(key)) for key, inner in value.items()}
    return known if _without_folders(known) == value else value


def hash_tensors(tensors: Tensors) -> str:
    """Return the hexadecimal SHA-256 of the tensors' names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(
    path: Path, which: Literal["model", "ema"] = "model", *, shapes_only: bool = False
) -> tuple[State, Json]:
    """Read a weight file: its tensors, and Atelier's metadata (`{}` for a foreign file).

    Files that do not end in .safetensors are read by torch with weights_only, so no code in them runs. float8 becomes
    bfloat16, which has the same values and more operations. which: the weights or their average. shapes_only: return
    tensors on the meta device, from the header of a safetensors file. Raises UserError, with the key `init_weights` if
    the file has no average.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder or a weight file")
    if path.suffix == ".onnx":
        raise UserError(f"{path}: predict.py and evaluate.py read ONNX; name its run, or a weight file beside it")
    texts = {}
    if path.suffix != ".safetensors":
        tensors, metadata = read_torch(path, which)
    else:
        tensors, texts = read_header(path)
        with readable(path, "safetensors"):
            metadata = read_saved(json.loads(texts.get("atelier", "{}")))
        if _TYPES in texts and texts[_TYPES] != _types(tensors):  # of a converted file, no checksum holds
            texts.pop(_CHECKSUM, None)
        if _CHECKSUM in texts:
            metadata["weights_hash"] = texts[_CHECKSUM][:16]  # what is derived from weights is bound to it
    if which == "ema" and metadata.get("average") is not True:
        raise UserError(
            f"init_weights: ema, but {path} has no average; set init_weights=model, or name a run with loop.ema_decay "
            "or a torch checkpoint with an average"
        )
    if shapes_only:
        return {name: tensor.to("meta") for name, tensor in tensors.items()}, metadata
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
    if _CHECKSUM in texts and hash_tensors(tensors) != texts[_CHECKSUM]:
        raise UserError(
            f"{path} does not match {_CHECKSUM} of its header: it is damaged, or another program changed "
            "it; copy it again, name other weights, or let that program leave the header out"
        )
    with readable(path, "weight"):  # torch can neither convert nor compute with floats of four bits
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.itemsize == 1:
                tensors[name] = tensor.bfloat16()
    refuse_not_finite(tensors, path)
    return tensors, metadata


def read_torch(path: Path, which: str = "model") -> tuple[State, Json]:
    """Return the state dict of a torch file, on the CPU, or the weights or average (`ema`) of a checkpoint.

    The metadata of a checkpoint are the names of its `entries`, whether the result is the `average`, and its licence as
    `origin`, for export.py. An `argparse.Namespace` in a checkpoint is ignored. Raises UserError for other pickled
    objects, for damage, and if there is no state dict of plain tensors.
    """
    try:
        # As a stream: torch would read a path that ends in .safetensors in another way.
        with open(path, "rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(stream, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # on a damaged file torch raises KeyError, IndexError, struct.error and more
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch's message also advises to turn weights_only off
        reason = f"it names {named[1]}" if named else type(error).__name__
        raise UserError(
            f"{path} is not a readable torch file of tensors alone, and no code in it was run ({reason}); give a "
            ".safetensors file of these weights"
        ) from None
    metadata = {}
    if isinstance(content, dict):
        states = [name for names in ENTRIES.values() for name in names if isinstance(content.get(name), dict)]
        if states:
            metadata["entries"] = list(map(str, content))
            if isinstance(licence := content.get("license"), str):
                metadata["origin"] = {"license": licence[:_SHOWN_CHARACTERS]}
            chosen = next((name for name in ENTRIES[which] if name in states), states[0])
            metadata["average"] = chosen in ENTRIES["ema"]
            content = content[chosen]
    if not isinstance(content, dict) or not content or not all(map(_is_plain, content.keys(), content.values())):
        raise UserError(f"{path} holds no state dict of plain tensors but a {type(content).__name__}")
    return content, metadata


def _is_plain(name: Any, tensor: Any) -> bool:
    """Return whether an entry is a named dense tensor, stored whole: with strides of 0 it would repeat one number."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return is_dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


def refuse_not_finite(tensors: Tensors, path: Path) -> None:
    """Raise UserError if a tensor has values that are NaN or infinite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # A NaN is both extremes. torch.isfinite of a whole tensor takes twelve times as long: 20 s of SDXL's start.
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(
                f"{path} has {int((~tensor.isfinite()).sum()):,} values in {name} that are not finite (NaN, infinite); "
                "give earlier weights, such as an earlier checkpoint or best_weights.safetensors"
            )


def read_header(path: Path) -> tuple[State, dict[str, str]]:
    """Return a safetensors file's tensors, on the meta device, and metadata. Reads only the header."""
    with readable(path, "safetensors"), safe_open(path, "pt") as file:
        # These tensors are views of the mapped file: their values are not read.
        tensors = {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (no dictionary)
        return tensors, file.metadata() or {}


def read_tensors(path: Path) -> State:
    """Read the tensors of a safetensors file."""
    with readable(path, "safetensors"):
        return load_file(path)
