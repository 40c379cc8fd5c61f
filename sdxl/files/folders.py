"""The weight files and configurations in folders of diffusers."""

from functools import cache
from pathlib import Path

from sdxl.files.family import PARTS
from utils.errors import UserError
from utils.io.files import Json, read_json, readable
from utils.io.hub import fetch, is_reference

_VARIANTS = ("", ".fp16", ".bf16")  # of files


def unusable(reason: str) -> UserError:
    """Return the error for a file or folder that is no SDXL."""
    return UserError(f"{reason}; name a diffusers folder or a single .safetensors file of SDXL")


def weight_files(place: Path, part: str) -> list[Path]:
    """Return the files of a part in its folder: one file or its shards; a half-precision variant if there is no other.

    Only the index says which shards belong together: others may be left from earlier.
    """
    name = PARTS[part].file
    for variant in _VARIANTS:
        whole = place / f"{name}{variant}.safetensors"
        index = place / f"{name}.safetensors.index{variant}.json"
        if whole.is_file() and index.is_file():
            raise unusable(f"{place} has both {whole.name} and shards ({index.name}); remove what is old")
        if whole.is_file():
            return [whole]
        if index.is_file():
            named = read_config(index).get("weight_map")
            shards = sorted({str(file) for file in named.values()}) if isinstance(named, dict) else []
            if not shards or any(Path(file).name != file for file in shards):
                raise unusable(f"{index} names no files of its folder as weight_map")
            return [place / file for file in shards]
    raise unusable(f"{place} has no {name}.safetensors")


@cache
def local_base(path: str | Path) -> Path:
    """Return the file or folder of a base model; of a name on the hub, after its files are fetched."""
    if not is_reference(reference := str(path)):
        return Path(path)
    folder = fetch(reference, ["model_index.json"], ["scheduler/scheduler_config.json"])
    for part in PARTS if folder.is_dir() else ():
        name = f"{part}/{PARTS[part].file}"
        whole = [f"{name}{variant}.safetensors" for variant in _VARIANTS]
        indices = [f"{name}.safetensors.index{variant}.json" for variant in _VARIANTS]
        fetch(reference, (f"{part}/config.json",), [*whole, *indices])
        fetch(reference, *([f"{part}/{file.name}"] for file in weight_files(folder / part, part)))
    return folder


def read_config(file: Path) -> Json:
    """Read a file with a JSON object."""
    with readable(file, "JSON"):
        return {**read_json(file)}  # a list is refused
