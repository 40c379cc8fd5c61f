"""SDXL's tensors from a folder of diffusers or a single file, under the names of published folders."""

import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from models.sdxl.names import PARTS, PREFIXES, from_folder, from_single_file
from utils.errors import UserError
from utils.io.files import read_json
from utils.io.weights import read_header, read_weights

State = dict[str, Tensor]
_MAX_TEXT = 200  # characters of what a file says about itself
_MAX_CARD = 10_000  # characters of a model card in which its front matter ends
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Tensors by which another kind of checkpoint is known.
_OTHERS = {
    "cond_stage_model.": "Stable Diffusion 1 or 2",
    "conditioner.embedders.0.model.": "SDXL's refiner",
    "edm_vpred.sigma_max": "an SDXL with EDM's noise levels",
    "edm_mean": "Playground 2.5",
}
_ADVICE = "name a folder of diffusers or a single .safetensors file of SDXL"


class Description(NamedTuple):
    """What is known before tensors are read.

    shapes: the tensors of each part, on the meta device. configs: what a folder states of each part. source: as
    SDXLNetworks has it.
    """

    shapes: dict[str, State]
    configs: dict[str, dict[str, Any]]
    source: dict[str, Any]


def describe(path: Path, key: str) -> Description:
    """Read headers and configs. Raises UserError (`key`) for other kinds of checkpoints."""
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; {_ADVICE}")
    return _describe_folder(path, key) if path.is_dir() else _describe_file(path, key)


def list_files(path: Path, key: str) -> list[Path]:
    """Return the files that have the tensors of a folder or a single file."""
    return [file for part in PARTS for file in _weight_files(path, part, key)] if path.is_dir() else [path]


def read_states(path: Path, key: str, only: Collection[str]) -> dict[str, State]:
    """Read the tensors of the parts `only`; values that are not finite, and damaged files, are refused."""
    if not path.is_dir():
        state, _ = read_weights(path, key)
        return {part: from_single_file(part, state) for part in only}
    return {part: _collect(path, part, key, lambda file: read_weights(file, key)[0]) for part in only}


def _describe_file(path: Path, key: str) -> Description:
    shapes, texts = read_header(path, key)
    for mark, kind in _OTHERS.items():
        if any(name.startswith(mark) for name in shapes):
            raise UserError(f"{key}: {path} is a checkpoint of {kind}, not of SDXL; {_ADVICE}")
    parts = {part: from_single_file(part, shapes) for part in PARTS}
    if missing := [PREFIXES[part] for part in PARTS if not parts[part]]:
        raise UserError(f"{key}: {path} has no tensors of {', '.join(missing)}; {_ADVICE}")
    is_v = "v_pred" in shapes or texts.get("modelspec.prediction_type") == "v"
    source = {
        "layout": "single file",
        "prediction_type": "v_prediction" if is_v else "epsilon",
        "zero_terminal_snr": is_v and "ztsnr" in shapes,
        "licence": texts["modelspec.license"][:_MAX_TEXT] if "modelspec.license" in texts else None,
    }
    return Description(parts, {part: {} for part in PARTS}, source)


def _describe_folder(path: Path, key: str) -> Description:
    kind = str(_read_config(path / "model_index.json", key).get("_class_name"))[:_MAX_TEXT]
    if not kind.startswith("StableDiffusionXL"):
        raise UserError(f"{key}: {path} is a {kind}, not a StableDiffusionXLPipeline; {_ADVICE}")
    scheduler = _read_config(path / "scheduler" / "scheduler_config.json", key)
    prediction, rescaled = scheduler.get("prediction_type", "epsilon"), scheduler.get("rescale_betas_zero_snr", False)
    if prediction not in _PREDICTIONS or not isinstance(rescaled, bool):
        raise UserError(
            f"{key}: {path / 'scheduler'} has prediction_type {prediction!r:.99} and rescale_betas_zero_snr "
            f"{rescaled!r:.99}; allowed are {', '.join(_PREDICTIONS)} and true or false"
        )
    shapes = {part: _collect(path, part, key, lambda file: read_header(file, key).tensors) for part in PARTS}
    configs = {part: _read_config(path / part / "config.json", key) for part in PARTS}
    factor, upcast = configs["vae"].get("scaling_factor"), configs["vae"].get("force_upcast", True)
    if not (isinstance(factor, float) and 0 < factor < math.inf and isinstance(upcast, bool)):
        raise UserError(
            f"{key}: {path / 'vae'} has scaling_factor {factor!r:.99} and force_upcast {upcast!r:.99}; SDXL's are "
            "0.13025 and true"
        )
    source = {"layout": "diffusers", "prediction_type": prediction, "zero_terminal_snr": rescaled}
    return Description(shapes, configs, {**source, "licence": _stated_licence(path / "README.md")})


def _stated_licence(card: Path) -> str | None:
    """Return the licence in the front matter of a model card, None where there is none."""
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as stream:
        found = re.match(r"---\n(?:(?!---).*\n)*?license: *(\S+)", stream.read(_MAX_CARD))
    return found and found[1][:_MAX_TEXT]


def weight_name(part: str) -> str:
    """Return what diffusers and transformers call a part's weight file, without its ending."""
    return "model" if part.startswith("text") else "diffusion_pytorch_model"


def _weight_files(folder: Path, part: str, key: str) -> list[Path]:
    """Return the files of a part: one, its shards, or the variant in half precision."""
    name = weight_name(part)
    for file in (f"{name}.safetensors", f"{name}.fp16.safetensors"):
        if (folder / part / file).is_file():
            return [folder / part / file]
    if shards := sorted((folder / part).glob(f"{name}-*.safetensors")):
        return shards
    raise UserError(f"{key}: {folder} has no {part}/{name}.safetensors; {_ADVICE}")


def _collect(folder: Path, part: str, key: str, read: Callable[[Path], State]) -> State:
    state: State = {}
    for file in _weight_files(folder, part, key):
        state |= read(file)
    return from_folder(part, state)


def _read_config(file: Path, key: str) -> dict[str, Any]:
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read ({str(error) or type(error).__name__}); {_ADVICE}") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} holds no JSON object; {_ADVICE}")
    return config
