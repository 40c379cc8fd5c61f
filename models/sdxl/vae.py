"""The VAE's values, which turn its outputs z into latents, and the files that a VAE comes from.

latents = (z - latents_mean) / latents_std * scaling_factor, per channel, as in diffusers' pipelines of SDXL. These
ignore `shift_factor`, so the configuration of a network states a shift as `latents_mean`, too.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.sdxl.family import CHANNELS, PREFIXES, VAE_SCALING_FACTOR
from models.sdxl.folders import local_base, read_config, weight_files
from utils.config.bounds import Positive
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import readable
from utils.io.weights import find_weights, hash_tensors, is_run, read_header

_OWN = "vae."  # what precedes tensors in the weights of finetune_vae.py
_Number = Annotated[float, Field(ge=-1e6, le=1e6)]
_Channels = Annotated[list[_Number], Field(min_length=CHANNELS, max_length=CHANNELS)]
_Deviations = Annotated[list[Positive], Field(min_length=CHANNELS, max_length=CHANNELS)]


class VAEValues(Strict):
    """How outputs become latents, and the padding of convolutions. null: as the VAE states, or else as SDXL's."""

    scaling_factor: Positive | None
    shift_factor: _Number | None
    latents_mean: _Channels | None
    latents_std: _Deviations | None
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] | None

    @model_validator(mode="after")
    def _fits_together(self) -> "VAEValues":
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std belong together: give both or none")
        if self.shift_factor and any(self.latents_mean or ()):
            raise ValueError("shift_factor and latents_mean are two ways to say the same: set one of them to 0")
        return self


AS_STATED = VAEValues(**dict.fromkeys(VAEValues.model_fields))


# ------------------------------------------------------------------------------------------------- where a VAE lies


def vae_files(path: str | Path) -> list[Path]:
    """Return the weight files of a VAE: of a folder of diffusers (a VAE or a whole model), a file, or a run's VAE.

    Weights of finetune_vae.py come last, after the files of the VAE that they were trained from.
    """
    path = Path(path)
    if path.is_dir() and not is_run(path):
        return weight_files(_folder(path), "vae")
    file = find_weights(str(path), "best")
    began = _began_with(file)
    return [*([] if began is None else vae_files(began)), file]


def read_vae(path: str | Path, read: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the VAE's tensors as a single file names them, or as diffusers does. read: reads a file's tensors."""
    prefix = PREFIXES["vae"]
    state: dict[str, Tensor] = {}
    for file in vae_files(path):
        tensors = read(file)
        inside = next((mark for mark in (prefix, _OWN) if any(name.startswith(mark) for name in tensors)), "")
        state |= {prefix + name.removeprefix(inside): one for name, one in tensors.items() if name.startswith(inside)}
    return state


def stated_config(path: str | Path) -> dict[str, Any]:
    """Return what a VAE says of itself: config.json of its folder, or `vae` in the header that Atelier writes."""
    path = Path(path)
    if path.is_dir() and not is_run(path):
        return read_config(_folder(path) / "config.json")
    file = find_weights(str(path), "best")
    beside = file.with_name("config.json")
    if beside.is_file() and file.stem.startswith("diffusion_pytorch_model"):
        return read_config(beside)
    metadata = _header(file)
    own = metadata["model"].get("vae_values") if _began_with(file) is not None else metadata.get("vae")
    return own if isinstance(own, dict) else {}


def _folder(path: Path) -> Path:
    return path / "vae" if (path / "vae").is_dir() else path


def _header(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file; name one, a folder of diffusers, or a run of finetune_vae.py")
    with readable(file, "safetensors"):
        return dict(json.loads(read_header(file)[1].get("atelier", "{}")))


def _began_with(file: Path) -> str | None:
    """Return the VAE that weights of finetune_vae.py began with, None for other files."""
    metadata = _header(file)
    model = metadata.get("model")
    if not isinstance(model, dict):
        return None
    began = model.get("vae") or model.get("path")
    if not isinstance(began, str) or metadata.get("script") != "finetune_vae":
        raise UserError(f"{file} holds no VAE: name a run of finetune_vae.py that began with a file or folder")
    place = local_base(began)
    if not place.exists():
        raise UserError(
            f"{file} began with {began}, which does not exist; restore it, or name the VAE that export.py writes: "
            "format=vae run_dir=RUN model.path=NEW"
        )
    return str(place)


def refuse_other_encoder(path: Path, vae: nn.Module) -> None:
    """Raise UserError if the encoder is not that with which finetune_vae.py trained a run's decoder."""
    if path.suffix != ".safetensors" and not is_run(path):
        return
    frozen = _header(find_weights(str(path), "best")).get("frozen")
    for name in ("encoder", "quant_conv") if isinstance(frozen, dict) else ():
        found = hash_tensors(vae.get_submodule(name).state_dict())[:16]
        if frozen.get(_OWN + name, found) != found:
            raise UserError(f"{path} was trained with another frozen {name}; restore the VAE that it began with")


# ----------------------------------------------------------------------------------------------------------- values


def settle_values(values: VAEValues, path: str | Path | None, *, is_replaced: bool = False) -> VAEValues:
    """Return the values of a run: given ones, else those that the VAE at `path` states, else SDXL's.

    is_replaced: another VAE than the base model's. Raises UserError if it states statistics of its latents that are not
    given: SDXL's U-Net has not been trained with any.
    """
    given = values.model_dump(exclude_none=True)
    found = {} if path is None else stated_config(path)
    stated = {name: found.get(name) for name in VAEValues.model_fields}
    if stated["shift_factor"] and stated["latents_mean"] == [stated["shift_factor"]] * CHANNELS:
        stated["latents_mean"] = [0.0] * CHANNELS  # `set_values` states a shift twice
    with readable(Path(path or ""), "VAE"):
        known = VAEValues.model_validate(stated).model_dump(exclude_none=True)
    plain = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    statistics = {name: known[name] for name in plain if name in known}
    if is_replaced and "latents_mean" not in given and statistics not in ({}, plain):
        words = " ".join(f"'model.vae_values.{name}={value}'" for name, value in plain.items())
        raise UserError(
            f"{path} states {statistics}, with which SDXL's U-Net was not trained; set {words} to keep the U-Net's "
            "latents, or both keys to the stated numbers, which takes a long run"
        )
    if given.get("shift_factor") or any(given.get("latents_mean", ())):  # one replaces the other
        known = {name: value for name, value in known.items() if name not in ("shift_factor", "latents_mean")}
    default = {"scaling_factor": VAE_SCALING_FACTOR, "shift_factor": 0.0, "padding_mode": "zeros", **plain}
    return VAEValues(**{**default, **known, **given})


def unlike_sdxls(values: VAEValues) -> dict[str, Any]:
    """Return the settled values that are not SDXL's."""
    usual = settle_values(AS_STATED, None)
    return {name: value for name, value in values if value not in (None, getattr(usual, name))}


def set_values(vae: nn.Module, values: VAEValues) -> None:
    """Write settled values into a VAE's configuration, and set the padding of its convolutions."""
    mean = [values.shift_factor + number for number in values.latents_mean]
    is_plain = not any(mean) and set(values.latents_std) == {1.0}
    vae.register_to_config(
        scaling_factor=values.scaling_factor,
        shift_factor=values.shift_factor or None,
        latents_mean=None if is_plain else mean,
        latents_std=None if is_plain else values.latents_std,
    )
    if values.padding_mode != "zeros":
        vae.register_to_config(padding_mode=values.padding_mode)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d) and any(layer.padding):
            layer.padding_mode = values.padding_mode


def latent_scale(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Return mean and factor [4, 1, 1], float32 on the CPU: latents = (z - mean) * factor."""
    config = vae.config
    mean = torch.tensor(config.latents_mean or [0.0] * CHANNELS)
    std = torch.tensor(config.latents_std or [1.0] * CHANNELS)
    return mean.view(-1, 1, 1), (config.scaling_factor / std).view(-1, 1, 1)


def fold_values(vae: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's tensors with its values in them, for programs that know SDXL's scaling factor alone.

    Both 1x1 convolutions between the networks and the latents take them, so no other tensor changes.
    """
    mean, factor = (part.double().flatten() for part in latent_scale(vae))
    ratio = factor / torch.tensor(VAE_SCALING_FACTOR).double()
    if not mean.any() and (ratio == 1).all():
        return dict(state)
    inner = state["quant_conv.weight"].double()
    outer = state["post_quant_conv.weight"].double()
    rows = torch.cat([ratio, torch.ones_like(ratio)])  # the means, then the log variances
    shifts = torch.cat([-mean * ratio, 2 * ratio.log()])
    folded = {
        "quant_conv.weight": inner * rows.view(-1, 1, 1, 1),
        "quant_conv.bias": state["quant_conv.bias"].double() * rows + shifts,
        "post_quant_conv.weight": outer / ratio.view(1, -1, 1, 1),
        "post_quant_conv.bias": state["post_quant_conv.bias"].double() + outer[:, :, 0, 0] @ mean,
    }
    return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in folded.items()}}
