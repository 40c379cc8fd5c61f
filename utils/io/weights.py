"""Weight files: safetensors that can be used alone, and foreign files read without unpickling code."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.errors import UserError, about
from utils.io.files import fsync_path, readable, write_atomically
from utils.ranks import distributed
from utils.record.run_reader import RunReader

WEIGHT_NAMES = ("best", "last", "ema")  # of a run with an average, `best` is the best average
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder that timm or transformers wrote
_CHECKSUM = "atelier_sha256"
_SHOWN_CHARACTERS = 120  # of a name or a reason in a file
# The entries under which trainers keep weights and their average; `model_ema` is that of the official fine-tuning,
# `state_dict_ema` timm's.
ENTRIES = {"model": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}


class InitFrom(NamedTuple):
    """Where a run's first weights come from: a run, a file, or `timm`; and which, where there is an average too."""

    source: str
    weights: Literal["model", "ema"]

    def find(self) -> Path:
        """Return the weight file. Raises UserError where there is none."""
        return find_weights(self.source, "ema" if self.weights == "ema" else "last")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, none sharing memory with another."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        is_part = tensor.nbytes != tensor.untyped_storage().nbytes()
        plain[name] = tensor.clone() if pointer in seen or is_part else tensor
        seen.add(pointer)
    return plain


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file and flush it to the disk."""
    save_file(_plain(tensors), path, metadata=dict(metadata or {}))
    fsync_path(path)


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a weight file on rank 0; its metadata says model, preprocessing, classes and step."""
    if distributed.is_main():
        texts = weight_metadata(metadata, tensors)
        write_atomically(path, lambda temporary: write_tensors(temporary, tensors, texts))


def weight_metadata(metadata: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return metadata as a safetensors header holds them: `atelier`, of JSON, and the tensors' checksum."""
    return {"atelier": json.dumps(metadata), _CHECKSUM: hash_tensors(tensors)}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of tensors' names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(
    path: Path, which: Literal["model", "ema"] = "model", *, shapes_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weight file: its tensors, and the metadata that Atelier wrote (`{}` for a foreign file).

    What does not end in .safetensors is read by torch with weights_only, so no code in it runs. which: the weights of a
    torch checkpoint, or their average; a safetensors file is an average where its metadata say so. shapes_only: return
    the tensors on the meta device, for the price of a safetensors header. Raises UserError, of `init_weights` where the
    file has no average.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a run folder or a weight file")
    texts: dict[str, str] = {}
    if path.suffix != ".safetensors":
        tensors, metadata = read_torch(path, which)
    else:
        tensors, texts = read_header(path)
        with readable(path, "safetensors"):
            metadata = dict(json.loads(texts.get("atelier", "{}")))
    if which == "ema" and metadata.get("average") is not True:
        raise UserError(
            f"init_weights: ema, but {path} holds no average; set init_weights=model, or name what has one: a run with "
            "loop.ema_decay, or a torch checkpoint that holds one beside its weights"
        )
    if shapes_only:
        return {name: tensor.to("meta") for name, tensor in tensors.items()}, metadata
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
    if _CHECKSUM in texts and hash_tensors(tensors) != texts[_CHECKSUM]:
        raise UserError(
            f"{path} is damaged: its tensors do not match its checksum; copy it again, or name other weights, such as "
            "weights.safetensors of an earlier checkpoint"
        )
    refuse_not_finite(tensors, path)
    return tensors, metadata


def read_torch(path: Path, which: str = "model") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict of a file, on the CPU: bare, or the weights or the average (`ema`) of a checkpoint.

    With it, of a checkpoint: the names of its `entries`, whether it is the `average`, and as `origin` its `licence`,
    which export.py writes. An `argparse.Namespace`, as training scripts save their arguments, is ignored. Raises
    UserError for other pickled objects, damage, and what is no state dict of plain tensors.
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
        if states:
            metadata["entries"] = [str(name)[:_SHOWN_CHARACTERS] for name in content]
            if isinstance(licence := content.get("licence"), str):
                metadata["origin"] = {"licence": licence[:_SHOWN_CHARACTERS]}
            chosen = next((name for name in ENTRIES[which] if name in states), states[0])
            metadata["average"] = chosen in ENTRIES["ema"]
            content = content[chosen]
    if not isinstance(content, dict) or not content or not all(map(_is_plain, content.keys(), content.values())):
        raise UserError(f"{path} holds no state dict of plain tensors but a {type(content).__name__}")
    return content, metadata


def _is_plain(name: Any, tensor: Any) -> bool:
    """Tell whether an entry is a named tensor that is dense and stored whole: strides of 0 repeat one number."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return is_dense and tensor.nbytes <= tensor.untyped_storage().nbytes()


def refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError where a tensor of a file has values that are NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not (fine := torch.isfinite(tensor)).all():
            raise UserError(
                f"{path} has {int((~fine).sum()):,} values in {name} that are not finite (NaN, infinite); give weights "
                "of before, such as an earlier checkpoint or best_weights.safetensors"
            )


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file on the meta device, and its metadata; only the header is read."""
    with readable(path, "safetensors"), safe_open(path, "pt") as file:
        # These tensors are views of the mapped file, so nothing is read.
        tensors = {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (no dictionary)
        return tensors, file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file."""
    with readable(path, "safetensors"):
        return load_file(path)


def find_weights(run_or_file: str, which: str) -> Path:
    """Return a weight file: the file itself, that of a folder of timm or transformers, or <which> weights of a run.

    Raises UserError that lists what the run has.
    """
    path = Path(run_or_file)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path} does not exist; name a run folder or a weight file")
        return path
    if shards := sorted(path.glob("*.index.json")):
        raise UserError(
            f"the weights in {path} are in several files ({shards[0].name}), which Atelier does not read; save them as "
            "one: model.save_pretrained(FOLDER, max_shard_size='1TB') in transformers"
        )
    if not (path / "weights").is_dir() and (path / "config.json").is_file():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
    return RunReader(path).weights(which)


def choose_weights(run_dir: str, weights: str) -> Path:
    """Return the weights of a run by their name (WEIGHT_NAMES), or the file or run that `weights` names itself."""
    if weights not in WEIGHT_NAMES:
        return find_weights(weights, "best")
    with about("weights" if Path(run_dir).is_dir() else "run_dir"):
        return find_weights(run_dir, weights)
