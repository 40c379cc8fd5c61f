"""SDXL's four networks, from a diffusers folder or a single file, or tiny ones with random weights."""

import fnmatch
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from models.weights.fit import refuse_misfits
from sdxl.config import CHANNELS, SDXLConfig, VAEValues
from sdxl.files import family
from sdxl.files.family import PARTS, PREFIXES, Networks
from sdxl.files.folders import local_base, read_config, unusable, weight_files
from sdxl.files.names import drop_unused, from_folder, from_single_file, part_state, text_prefix
from sdxl.step import build_noise_table
from sdxl.vae import (
    AS_STATED,
    SDXLS,
    read_vae,
    refuse_other_encoder,
    set_values,
    settle_values,
    stated_config,
    vae_files,
)
from utils.contracts import State, Tensors
from utils.errors import UserError, about
from utils.io.files import Json, Values, readable
from utils.io.hub import stated_license
from utils.io.weights import read_header, read_weights

_TINY_WIDTH = 16  # channels of the first level of the tiny U-Net and VAE
_MAX_TEXT = 200  # characters of a text from a file
# Configuration that is read, or that does not change the networks.
_FREE = (*SDXLS, "shift_factor", "force_upcast", "sample_size", "upcast_attention", "_class_name", "_name_or_path")
_TABLE_TOLERANCE = 0.004  # of alphas: twice the rounding of bfloat16
_PREDICTIONS = {name: prediction for prediction, row in family.PREDICTIONS.items() for name in row.names}


def settle_model(model: SDXLConfig) -> SDXLConfig:
    """Return the config with all values of its VAE, so that later changes of files have no effect.

    Raises UserError (`model.path`, `model.vae`) for a base model that is no SDXL, and for a wrong VAE.
    """
    if model.path is not None:
        describe_base(model.path)
    with about("model.vae" if model.vae else "model.path"):
        values = settle_values(
            model.vae_values, model.vae or (model.path and local_base(model.path)), is_replaced=model.vae is not None
        )
    return model.changed({"vae_values": values})


def open_networks(model: SDXLConfig, only: Collection[str] = PARTS, *, frozen: bool = False) -> Networks:
    """Return the networks `only` of a config; frozen: without gradients, in `frozen_dtype`, int8 for the U-Net alone.

    A frozen VAE takes a batch image by image: four of 1024 px at once need 10 GiB, and one keeps a GPU busy.
    On the meta device, the base model may be missing: all of SDXL have the same shapes.
    """
    dtypes = {part: frozen_dtype(model, part) if frozen else torch.float32 for part in only}
    networks = {}
    is_meta = torch.get_default_device().type == "meta"
    if model.vae is not None and "vae" in dtypes:
        networks["vae"] = load_vae(model.vae, model.vae_values, dtypes.pop("vae"))
    if model.path is not None and (Path(model.path).exists() or not is_meta):
        networks |= load_networks(model.path, dtypes, model.vae_values)
    else:
        drawn = family.draw_networks(tiny=model.path is None or model.name == "sdxl_tiny")
        set_values(drawn["vae"], settle_values(model.vae_values, None))
        # nn.Module.to, because diffusers' own `to` warns about modules to keep in float32, and there are none.
        networks |= {part: nn.Module.to(drawn[part], dtype) for part, dtype in dtypes.items()}
    if not frozen:
        return networks
    for network in networks.values():
        network.requires_grad_(False)
    if "vae" in networks:
        networks["vae"].enable_slicing()
    if model.frozen_dtype == "int8" and "unet" in networks:
        for name, layer in list(networks["unet"].named_modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d) and name not in ("conv_in", "conv_out"):
                register_parametrization(layer, "weight", _Int8())
    return networks


class _Int8(nn.Module):
    """Store a weight as int8 and a scale for each row, which brings its largest number to 127."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored tensors of a weight."""
        rows = weight.float().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12)
        scale = (rows / 127).to(weight.dtype)
        return (weight.float() / scale.float()).round().to(torch.int8), scale

    def forward(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the weight, in the scale's dtype."""
        return values.to(scale.dtype) * scale


def frozen_dtype(model: SDXLConfig, part: str) -> torch.dtype:
    """Return the dtype of a part that is not trained; weights in int8 are cast to bfloat16.

    The VAE is always in float32: bfloat16 changes latents 20 times as much as the cache's rounding, for all epochs.
    """
    return torch.float32 if part == "vae" else getattr(torch, model.frozen_dtype.replace("int8", "bfloat16"))


@about("model.path")
def load_networks(
    path: str | Path,
    dtypes: Mapping[str, torch.dtype] = dict.fromkeys(PARTS, torch.float32),
    values: VAEValues = AS_STATED,
) -> Networks:
    """Read the networks named in `dtypes` from a diffusers folder or a single file, without a hub, in eval mode.

    If torch's default device is meta, only shapes are read. values: of the VAE. Raises UserError (`model.path`) for
    another kind of checkpoint, missing or unexpected tensors, wrong shapes, or a damaged file.
    """
    path = local_base(path)
    describe_base(path)  # refuses other kinds of checkpoints
    return _load(path, PARTS, dtypes, values) if dtypes else {}


@about("model.vae")
def load_vae(path: str | Path, values: VAEValues = AS_STATED, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Read a VAE from what `vae_files` accepts, as `load_networks` does. Raises UserError (`model.vae`)."""
    vae = _load(Path(path), ("vae",), {"vae": dtype}, values)["vae"]
    if vae.device.type != "meta":
        refuse_other_encoder(Path(path), vae)
    return vae


def _load(path: Path, parts: Collection[str], dtypes: Mapping[str, torch.dtype], values: VAEValues) -> Networks:
    """Read the networks in `dtypes`, after a comparison of all `parts` of a file or folder with SDXL."""
    built = _build_to_fit(path, parts)
    networks = {part: nn.Module.to(built[part], dtype) for part, dtype in dtypes.items()}
    if torch.get_default_device().type != "meta":
        states = _read_parts(path, dtypes, lambda file: read_weights(file)[0])
        for part, network in networks.items():
            copies = {name: tensor.to(dtypes[part], copy=True) for name, tensor in states.pop(part).items()}
            prefix = text_prefix(part, network)
            network.load_state_dict({name.removeprefix(prefix): one for name, one in copies.items()}, assign=True)
            for module in network.modules():
                if hasattr(module, "position_ids"):  # not in the state
                    module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    if "vae" in networks:
        set_values(networks["vae"], settle_values(values, path))
    return networks


def _build_to_fit(path: Path, parts: Collection[str]) -> Networks:
    """Build networks of a file or folder on the meta device."""
    shapes = _read_parts(path, parts, lambda file: read_header(file)[0])
    stated = {part: read_config(path / part / "config.json") for part in parts if (path / part).is_dir()}
    configs = {}
    for part in parts:
        first = shapes["vae"].get("encoder.conv_in.bias") if part == "vae" else shapes["unet"].get("conv_in.bias")
        configs[part] = family.list_configs(tiny=first is not None and _TINY_WIDTH in first.shape)[part]
    if "vae" in parts:
        stated["vae"] = stated_config(path)
        configs["vae"]["force_upcast"] = _read_upcast(path, shapes["vae"], stated["vae"])
    if shapes.get("unet", {}).get("conv_in.weight", torch.empty(0)).shape[1:2] == (9,):
        raise UserError(f"{path} has a U-Net that inpaints, which is not trained here; name one of 4 input channels")
    with torch.device("meta"):
        networks = {part: family.build_part(part, configs[part]) for part in parts}
    for part, network in networks.items():
        refuse_misfits(shapes[part], part_state(part, network), f"SDXL's {part} in {path}", "Name another file.")
        # All of diffusers' configuration counts; transformers' also describes other things than the network.
        wanted = configs[part] if part.startswith("text") else dict(network.config)
        for name, other in stated.get(part, {}).items():
            # 0, false and null are the same here.
            if name in wanted and name not in _FREE and (other or None) != (wanted[name] or None):
                raise UserError(f"{path}/{part}/config.json has {name} {other!r:.99}, but SDXL has {wanted[name]!r}")
    return networks


def _read_upcast(path: Path, shapes: Tensors, stated: Values) -> bool:
    """Return whether a VAE overflows in float16. Raises UserError if it is none of SDXL's kind."""
    inner = shapes.get("decoder.conv_in.weight")
    if inner is None or inner.ndim != 4 or inner.shape[1] != CHANNELS:
        given = "no VAE" if inner is None else f"a VAE with latents of {list(inner.shape)[1:2]} channels"
        raise UserError(f"{path} has {given}; SDXL needs a VAE with latents of {CHANNELS} channels")
    upcast = stated.get("force_upcast", True)
    if not isinstance(upcast, bool):
        raise unusable(f"{path}/vae has force_upcast {upcast!r:.99}")
    return upcast


def unused_layer(text_encoder: nn.Module) -> str:
    """Return the name of the first encoder's last layer, `.layers.11.`. SDXL uses the output of the layer before."""
    return f".layers.{text_encoder.config.num_hidden_layers - 1}."


# ------------------------------------------------------------------------------------------------------- their files


@about("model.path")
def base_files(model: SDXLConfig, parts: Collection[str] = PARTS) -> list[Path]:
    """Return the weight files of parts of a config: a single file has them all."""
    if "vae" in parts and model.vae is not None:
        with about("model.vae"):
            own = vae_files(model.vae)
        return own + base_files(model, [part for part in parts if part != "vae"])
    if model.path is None:
        return []
    path = local_base(model.path)
    return sum((weight_files(path / part, part) for part in parts), []) if path.is_dir() else [path]


@about("model.path")
def describe_base(path: str | Path) -> Json:
    """Return the facts that a folder or file states, JSON values; None is unknown.

    `layout`, `license`, `prediction_type` (epsilon if a file does not say, `is_stated`), `zero_terminal_snr`, `shift`
    (of flow's sampling, 1 if a file does not say), `other_noise` (how its noise schedule differs from SDXL's, or None),
    `unread` (names of tensors that belong to no network), and `zeros_for_empty_prompt` (see `save_pipeline`; a single
    file's is encoded, as in ComfyUI and the web UIs).

    Raises UserError (`model.path`) for other kinds of checkpoints.
    """
    place = local_base(path)
    if not place.exists():
        raise unusable(f"{place} does not exist")
    facts = _describe_folder(place) if place.is_dir() else _describe_file(place)
    facts["license"] = facts["license"] or stated_license(path)
    if facts["prediction_type"] != "v_prediction":  # nobody states that it has no zero terminal SNR
        if facts["zero_terminal_snr"]:
            facts["other_noise"] = facts["other_noise"] or f"zero terminal SNR with {facts['prediction_type']}"
        facts["zero_terminal_snr"] = bool(facts["zero_terminal_snr"])
    return facts


def _describe_file(path: Path) -> Json:
    if path.suffix != ".safetensors":
        raise unusable(
            f"{path} is no .safetensors file; a .ckpt or .pt may run code when it is read: let a web UI or ComfyUI "
            "save it as one first; GGUF has quantised weights, which are not read"
        )
    names, texts = read_header(path)
    for mark, kind in family.OTHERS.items():
        if fnmatch.filter(names, mark):
            raise unusable(f"{path} is a checkpoint of {kind}")
    if missing := [prefix for prefix in PREFIXES.values() if not fnmatch.filter(names, f"{prefix}*")]:
        raise unusable(f"{path} has no tensors of {', '.join(missing)}")
    # ComfyUI's name of the key is not ModelSpec's.
    stated = texts.get("modelspec.prediction_type") or texts.get("modelspec.predict_key")
    prediction = "v_prediction" if "v_pred" in names else _PREDICTIONS.get((stated or "epsilon").lower())
    is_stated = stated is not None or "v_pred" in names
    if prediction is None:
        raise unusable(f"{path} says that it predicts {stated[:_MAX_TEXT]!r}, not epsilon, v or flow")
    rescaled = None
    other = None
    for table in ("denoiser.sigmas", "alphas_cumprod"):
        if table in names:
            rescaled, other = _recognise_table(path, table)
    if prediction == "v_prediction" and "ztsnr" in names:
        rescaled = True
    outside = (name for name in names if not name.startswith(tuple(PREFIXES.values())))
    return {
        "layout": "single file",
        "prediction_type": prediction,
        "is_stated": is_stated,
        "zero_terminal_snr": rescaled,
        "other_noise": other,
        "shift": _read_shift(texts.get("ss_discrete_flow_shift")),
        "license": texts.get("modelspec.license", "")[:_MAX_TEXT] or None,
        "unread": drop_unused(outside, family.UNUSED),
        "zeros_for_empty_prompt": False,
    }


def _recognise_table(path: Path, name: str) -> tuple[bool | None, str | None]:
    """Return whether a file's noise table has zero terminal SNR, or what is wrong with it (see `describe_base`)."""
    with readable(path, "safetensors"), safe_open(path, "pt") as file:
        values = file.get_tensor(name).double().flatten()
    alphas = values.sqrt() if name == "alphas_cumprod" else (1 + values.square()).rsqrt()
    for rescaled in (False, True):
        wanted = build_noise_table(rescaled).alpha
        if alphas.shape == wanted.shape and (alphas - wanted).abs().max() < _TABLE_TOLERANCE:
            return rescaled, None
    return None, f"its tensor {name} is another noise table"


def _describe_folder(path: Path) -> Json:
    index = read_config(path / "model_index.json")
    kind = str(index.get("_class_name"))[:_MAX_TEXT]
    if not kind.startswith("StableDiffusionXL") or index.get("requires_aesthetics_score"):
        raise unusable(f"{path} is a {kind}, not a StableDiffusionXLPipeline of SDXL's base, or it is of its refiner")
    own = read_config(path / "scheduler/scheduler_config.json")
    scheduler = family.SCHEDULER_DEFAULTS | own
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        scheduler |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    prediction = _PREDICTIONS.get(str(scheduler["prediction_type"]))
    rescaled = scheduler.get("rescale_betas_zero_snr")
    wrong = {}
    if prediction is None or not isinstance(rescaled, bool | None):
        wrong |= {"prediction_type": scheduler["prediction_type"], "rescale_betas_zero_snr": rescaled}
        prediction = "epsilon"
        rescaled = False
    wanted = family.PREDICTIONS[prediction].schedule
    wrong |= {name: scheduler.get(name) for name, value in wanted.items() if scheduler.get(name) != value}
    listed = ", ".join(f"{name} {value!r:.99}" for name, value in wrong.items())
    other = f"its {scheduler.get('_class_name')!s:.99} has {listed}" if wrong else None
    return {
        "layout": "diffusers",
        "prediction_type": prediction,
        "is_stated": "prediction_type" in own or prediction == "flow",
        "zero_terminal_snr": rescaled,
        "other_noise": other,
        "shift": _read_shift(scheduler.get("shift", scheduler.get("flow_shift"))),
        "license": None,
        "unread": [],
        "zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True) is True,
    }


def _read_shift(stated: object) -> float:
    text = str(stated)
    return float(text) or 1.0 if re.fullmatch(r"\d+(\.\d+)?", text) else 1.0


def _read_parts(path: Path, only: Collection[str], read: Callable[[Path], State]) -> dict[str, State]:
    """Return the tensors of parts under the names of published folders. read: reads a file's tensors."""
    if tuple(only) == ("vae",):
        return {"vae": from_single_file("vae", read_vae(path, read))}
    if not path.is_dir():
        whole = read(path)
        return {part: from_single_file(part, whole) for part in only}
    states = {}
    for part in only:
        state = {}
        for file in weight_files(path / part, part):
            state |= read(file)
        states[part] = from_folder(part, state)
    return states
