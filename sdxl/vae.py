"""The VAE's values, which turn its outputs z into latents, and the files that a VAE comes from.

latents = (z - latents_mean) / latents_std * scaling_factor, per channel, as in diffusers' pipelines of SDXL. These
ignore `shift_factor`, so the configuration of a network states a shift as `latents_mean`, too.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sdxl.config import CHANNELS, VAEValues
from sdxl.files.family import PREFIXES, VAE_SCALING_FACTOR
from sdxl.files.folders import local_base, read_config, weight_files
from utils.contracts import State, Tensors
from utils.errors import UserError
from utils.io.files import Json, readable
from utils.io.weight_files import find_weights, is_run
from utils.io.weights import hash_tensors, read_weights

_OWN = "vae."  # prefix of tensors in the weights of finetune_vae.py
_VALUES = TypeAdapter(VAEValues)
AS_STATED: VAEValues = {}
SDXLS: VAEValues = {
    "scaling_factor": VAE_SCALING_FACTOR,
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
    "padding_mode": "zeros",
}


# ------------------------------------------------------------------------------------------------- where a VAE lies


def vae_files(path: str | Path) -> list[Path]:
    """Return the weight files of a VAE: of a folder of diffusers (a VAE or a whole model), a file, or a run's VAE.

    Weights of finetune_vae.py come last, after the files of the VAE that they were trained from.
    """
    place = _locate(path)
    if place.is_dir():
        return weight_files(place, "vae")
    base = _base_of(place)
    return [*([] if base is None else vae_files(base)), place]


def read_vae(path: str | Path, read: Callable[[Path], Tensors]) -> State:
    """Return the VAE's tensors as a single file names them, or as diffusers does. read: reads a file's tensors."""
    prefix = PREFIXES["vae"]
    state = {}
    for file in vae_files(path):
        tensors = read(file)
        inside = next((mark for mark in (prefix, _OWN) if any(name.startswith(mark) for name in tensors)), "")
        state |= {prefix + name.removeprefix(inside): one for name, one in tensors.items() if name.startswith(inside)}
    return state


def stated_config(path: str | Path) -> Json:
    """Return the configuration of a VAE: config.json of its folder, or `vae` in the header that Atelier writes."""
    place = _locate(path)
    beside = place / "config.json" if place.is_dir() else place.with_name("config.json")
    if place.is_dir() or (beside.is_file() and place.stem.startswith("diffusion_pytorch_model")):
        return read_config(beside)
    metadata = _header(place)
    values = metadata.get("vae") if _base_of(place) is None else metadata["model"].get("vae_values")
    return values if isinstance(values, dict) else {}


def _locate(path: str | Path) -> Path:
    """Return the folder of a VAE of diffusers, or its weight file."""
    path = Path(path)
    if is_run(path) or not path.is_dir():
        return find_weights(str(path), "best")
    return path / "vae" if (path / "vae").is_dir() else path


def _header(file: Path) -> Json:
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file; name one, a folder of diffusers, or a run of finetune_vae.py")
    return read_weights(file, shapes_only=True)[1]


def _base_of(file: Path) -> str | None:
    """Return the VAE from which finetune_vae.py trained the weights of a file, None for other files."""
    metadata = _header(file)
    model = metadata.get("model")
    if not isinstance(model, dict):
        return None
    base = model.get("vae") or model.get("path")
    if not isinstance(base, str) or metadata.get("script") != "finetune_vae":
        raise UserError(f"{file} holds no VAE: name a run of finetune_vae.py that began with a file or folder")
    place = local_base(base)
    if not place.exists():
        raise UserError(
            f"{file} began with {base}, which does not exist; restore it, or name the VAE that export.py writes: "
            "format=vae run_dir=RUN model.path=NEW"
        )
    return str(place)


def refuse_other_encoder(path: Path, vae: nn.Module) -> None:
    """Raise UserError if finetune_vae.py trained a run's decoder with another encoder."""
    place = _locate(path)
    if place.suffix != ".safetensors":
        return
    frozen = _header(place).get("frozen")
    for name in ("encoder", "quant_conv") if isinstance(frozen, dict) else ():
        digest = hash_tensors(vae.get_submodule(name).state_dict())[:16]
        if frozen.get(_OWN + name, digest) != digest:
            raise UserError(f"{path} was trained with another frozen {name}; restore the VAE that it began with")


# ----------------------------------------------------------------------------------------------------------- values


def settle_values(given: VAEValues, path: str | Path | None, *, is_replaced: bool = False) -> VAEValues:
    """Return the values of a run: the given values, else the values that the VAE at `path` states, else SDXL's.

    is_replaced: the VAE is not the base model's. Raises UserError if such a VAE states statistics of latents that the
    command does not: SDXL's U-Net was trained without any.
    """
    if path is None:
        return {**SDXLS, **given}
    config = stated_config(path)
    stated = {name: config[name] for name in SDXLS if config.get(name) is not None}
    shift = [config.get("shift_factor") or 0.0] * CHANNELS
    with readable(Path(path), "VAE"):
        values = _VALUES.validate_python({**SDXLS, "latents_mean": shift, **stated})
    is_shift = values["latents_mean"] in (shift, SDXLS["latents_mean"])
    has_statistics = not is_shift or values["latents_std"] != SDXLS["latents_std"]
    if is_replaced and has_statistics and "latents_mean" not in given:
        raise UserError(
            f"{path} states latents_mean {values['latents_mean']} and latents_std {values['latents_std']}, with which "
            "SDXL's U-Net was not trained; set 'model.vae_values={latents_mean: [0.0, 0.0, 0.0, 0.0], latents_std: "
            "[1.0, 1.0, 1.0, 1.0]}' to keep the U-Net's latents, or the stated numbers, which takes a long run"
        )
    return {**values, **given}


def unlike_sdxls(values: VAEValues) -> Json:
    """Return the values that are not SDXL's."""
    return {name: value for name, value in values.items() if value != SDXLS[name]}


def set_values(vae: nn.Module, values: VAEValues) -> None:
    """Write settled values into a VAE's configuration, and set the padding of its convolutions."""
    own = {"scaling_factor": values["scaling_factor"], "latents_mean": None, "latents_std": None}
    if {"latents_mean", "latents_std"} & unlike_sdxls(values).keys():
        own |= {"latents_mean": values["latents_mean"], "latents_std": values["latents_std"]}
    padding = values["padding_mode"]
    if padding != "zeros":
        own["padding_mode"] = padding
    vae.register_to_config(**own)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d) and any(layer.padding):
            layer.padding_mode = padding


def latent_scale(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Return mean and factor [4, 1, 1], float32 on the CPU: latents = (z - mean) * factor."""
    config = vae.config
    mean = torch.tensor(config.latents_mean or [0.0] * CHANNELS)
    std = torch.tensor(config.latents_std or [1.0] * CHANNELS)
    return mean.view(-1, 1, 1), (config.scaling_factor / std).view(-1, 1, 1)


def fold_values(vae: nn.Module, state: Tensors) -> State:
    """Return the VAE's tensors with its values in them, for programs that know SDXL's scaling factor alone.

    Both 1x1 convolutions between the networks and the latents take them, so no other tensor changes.
    """
    mean, factor = (part.double().flatten() for part in latent_scale(vae))
    ratio = factor / torch.tensor(VAE_SCALING_FACTOR).double()
    if not mean.any() and (ratio == 1).all():
        return dict(state)
    folded = dict(state)
    scale = torch.cat([ratio, torch.ones_like(ratio)])  # the means, then the log variances
    shift = torch.cat([-mean * ratio, 2 * ratio.log()])
    folded["quant_conv.weight"] = state["quant_conv.weight"].double() * scale.view(-1, 1, 1, 1)
    folded["quant_conv.bias"] = state["quant_conv.bias"].double() * scale + shift
    outer = state["post_quant_conv.weight"].double()
    folded["post_quant_conv.weight"] = outer / ratio.view(1, -1, 1, 1)
    folded["post_quant_conv.bias"] = state["post_quant_conv.bias"].double() + outer[:, :, 0, 0] @ mean
    return {name: tensor.to(state[name].dtype) for name, tensor in folded.items()}
