"""SDXL's four networks, from a folder of diffusers, a single file, or drawn tiny: all of one topology.

Sizes are read from the shapes of tensors, so that both layouts go one way and a tiny SDXL is read as the real one is.
Heads of attention are 64 wide, as in SDXL; a network narrower than 128 has one.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from models.sdxl.names import PARTS, PREFIXES, from_folder, from_single_file, load_part, part_state
from models.weights.fit import refuse_misfits
from utils.config.schema import PathText, Strict
from utils.errors import UserError
from utils.io.files import read_json
from utils.io.weights import read_header, read_weights

VAE_SCALING_FACTOR = 0.13025  # of SDXL's VAE: single files do not state it
_RESNET = "down_blocks.{}.resnets.0.conv1.weight"
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


class SDXLConfig(Strict):
    """Where SDXL's networks are: a folder of diffusers or a single .safetensors file; null draws tiny ones.

    frozen_dtype: of the networks that are not trained. in_channels: of the images.
    """

    family: Literal["sdxl"]
    name: str = Field(min_length=1)
    path: PathText | None
    frozen_dtype: Literal["float32", "bfloat16"]
    in_channels: Literal[3]


class Description(NamedTuple):
    """What is known before tensors are read.

    shapes: the tensors of each part, on the meta device. configs: what a folder states of each part. source: as
    SDXLNetworks has it.
    """

    shapes: dict[str, State]
    configs: dict[str, dict[str, Any]]
    source: dict[str, Any]


@dataclass
class SDXLNetworks:
    """The networks, None for those not asked for, and what is known of their source.

    source: JSON values of `path`, `layout`, `prediction_type`, `zero_terminal_snr` and `licence` (None: unknown), and
    `vae_scaling_factor`.
    """

    unet: nn.Module | None
    vae: nn.Module | None
    text_encoder: nn.Module | None
    text_encoder_2: nn.Module | None
    source: dict[str, Any]

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks that are there, by name."""
        return {part: network for part in PARTS if (network := getattr(self, part)) is not None}

    def states(self) -> dict[str, State]:
        """Return the tensors of each network that is there, under the names of published folders."""
        return {part: part_state(part, network) for part, network in self.parts().items()}


def open_networks(model: SDXLConfig, only: Collection[str] = PARTS, *, frozen: bool = False) -> SDXLNetworks:
    """Return the networks that a config names; frozen: without gradients, in `model.frozen_dtype`."""
    dtype = getattr(torch, model.frozen_dtype) if frozen else torch.float32
    if model.path is None:
        networks = tiny_networks(0)
        for part in PARTS:
            # nn.Module's, because diffusers' own warns of modules that it would keep in float32, and has none here.
            setattr(networks, part, nn.Module.to(getattr(networks, part), dtype) if part in only else None)
    else:
        networks = load_networks(model.path, "model.path", only=only, dtype=dtype)
    for part in only if frozen else ():
        getattr(networks, part).requires_grad_(False)
    return networks


def load_networks(
    path: str | Path, key: str, *, only: Collection[str] = PARTS, dtype: torch.dtype = torch.float32
) -> SDXLNetworks:
    """Read SDXL from a folder of diffusers or a single file, without a hub. The networks are in eval mode.

    only: the networks that are made (PARTS). Where torch's default device is meta, shapes alone are read. Raises
    UserError (`key`): another kind of checkpoint, missing or unexpected tensors, wrong shapes, a damaged file.
    """
    path = Path(path)
    found = describe(path, key)
    networks = _build_to_fit(found, path, key)
    if torch.get_default_device().type != "meta":
        if path.is_dir():
            states = _read_folder(path, key, only, lambda file: read_weights(file, key)[0])
        else:
            state, _ = read_weights(path, key)
            states = {part: from_single_file(part, state) for part in only}
        for part in only:
            _fill(part, networks[part], states.pop(part), dtype)
    source = {"path": str(path), **found.source, "vae_scaling_factor": networks["vae"].config.scaling_factor}
    return SDXLNetworks(**{part: networks[part] if part in only else None for part in PARTS}, source=source)


def tiny_networks(seed: int, vocab_size: int = 49408) -> SDXLNetworks:
    """Draw an SDXL whose U-Net has 0.8 million parameters. vocab_size: of the text encoders."""
    configs = {
        "unet": unet_config([16, 32, 32], [1, 1, 2], cross_width=80, pooled_width=48, time_width=16),
        "vae": vae_config([16, 16, 32, 32]),
        "text_encoder": text_config("quick_gelu", 32, 64, layers=2, vocab_size=vocab_size),
        "text_encoder_2": text_config("gelu", 48, 96, layers=2, vocab_size=vocab_size),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = {part: build_part(part, config) for part, config in configs.items()}
    facts = {"path": None, "layout": "drawn", "prediction_type": None, "zero_terminal_snr": None, "licence": None}
    return SDXLNetworks(**networks, source={**facts, "vae_scaling_factor": VAE_SCALING_FACTOR})


def build_part(part: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a network with drawn weights, in eval mode. config: what decides the tensors, and what they mean."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if part == "unet":
        return UNet2DConditionModel(sample_size=128, **config).eval()
    if part == "vae":
        return AutoencoderKL(sample_size=1024, **config).eval()
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    # The ids of control words are those of the published config. By 2, transformers takes the largest id for the end.
    return kind(CLIPTextConfig(bos_token_id=0, eos_token_id=2, pad_token_id=1, **config)).eval()


def unet_config(
    widths: list[int], depths: list[int], *, cross_width: int, pooled_width: int, time_width: int
) -> dict[str, Any]:
    """Return the U-Net's config. widths, depths: of the levels, and of their transformers; time_width: of one size."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "block_out_channels": widths,
        "transformer_layers_per_block": depths,
        "attention_head_dim": [max(1, width // 64) for width in widths],  # diffusers' name for the number of heads
        "norm_num_groups": min(32, widths[0] // 4),
        "cross_attention_dim": cross_width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": 6 * time_width + pooled_width,
    }


def vae_config(widths: list[int], stated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the VAE's config. stated: that of a folder, whose scale and marking for half precision are taken."""
    stated = stated or {}
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "norm_num_groups": min(32, widths[0] // 4),
        "latent_channels": 4,
        "latents_mean": None,
        "latents_std": None,
        "scaling_factor": stated.get("scaling_factor", VAE_SCALING_FACTOR),
        "force_upcast": stated.get("force_upcast", True),
    }


def text_config(activation: str, width: int, mlp_width: int, *, layers: int, vocab_size: int) -> dict[str, Any]:
    """Return a text encoder's config."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": 77,
        "hidden_act": activation,
    }


def _build_to_fit(found: Description, path: Path, key: str) -> dict[str, nn.Module]:
    """Return the networks, on the meta device, that what was found fits."""
    try:
        configs = _find_configs(found)
        with torch.device("meta"):
            networks = {part: build_part(part, configs[part]) for part in PARTS}
    except (LookupError, ArithmeticError, ValueError) as error:
        raise UserError(f"{key}: {path} does not have the tensors of SDXL: {error}; name another file") from None
    for part, network in networks.items():
        refuse_misfits(
            found.shapes[part],
            part_state(part, network),
            f"{key}: {part} of {path} is not SDXL's",
            "Name another file.",
        )
        stated = {name: found.configs[part].get(name, value) for name, value in configs[part].items()}
        if wrong := [name for name, value in configs[part].items() if stated[name] != value]:
            shown = "; ".join(f"{name} {stated[name]!r:.99}, not {configs[part][name]!r}" for name in wrong)
            raise UserError(f"{key}: {part} of {path} is not SDXL's: its config.json has {shown}; name another folder")
    return networks


def _find_configs(found: Description) -> dict[str, dict[str, Any]]:
    """Return the configs that tensors of these shapes have. Raises LookupError where a tensor or an axis is missing."""
    unet, vae, first, second = (found.shapes[part] for part in PARTS)
    vae_widths = [vae["encoder." + _RESNET.format(level)].shape[0] for level in range(4)]
    widths = [unet[_RESNET.format(level)].shape[0] for level in range(3)]
    depths = [1] + [_count(unet, f"down_blocks.{level}.attentions.0.transformer_blocks.") for level in (1, 2)]
    pooled_width = second["text_projection.weight"].shape[0]
    return {
        "unet": unet_config(
            widths, depths,
            cross_width=unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            pooled_width=pooled_width,
            time_width=(unet["add_embedding.linear_1.weight"].shape[1] - pooled_width) // 6,
        ),
        "vae": vae_config(vae_widths, found.configs["vae"]),
        "text_encoder": _text_config_of(first, "quick_gelu"),
        "text_encoder_2": _text_config_of(second, "gelu"),
    }  # fmt: skip


def _text_config_of(shapes: State, activation: str) -> dict[str, Any]:
    mlp_width, width = shapes["text_model.encoder.layers.0.mlp.fc1.weight"].shape
    vocab_size = shapes["text_model.embeddings.token_embedding.weight"].shape[0]
    layers = _count(shapes, "text_model.encoder.layers.")
    return text_config(activation, width, mlp_width, layers=layers, vocab_size=vocab_size)


def _count(names: Collection[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _fill(part: str, network: nn.Module, state: State, dtype: torch.dtype) -> None:
    """Give a network that is on the meta device its tensors, each in memory of its own."""
    load_part(part, network, {name: tensor.to(dtype, copy=True) for name, tensor in state.items()})
    for module in network.modules():
        if hasattr(module, "position_ids"):  # not in the state
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]


def unused_layer(text_encoder: nn.Module) -> str:
    """Return what is in the names of the first encoder's last layer, behind the one that is read: `.layers.11.`."""
    return f".layers.{text_encoder.config.num_hidden_layers - 1}."


def freeze_unused(text_encoder: nn.Module) -> None:
    """Turn off the gradients of the first encoder's last layer and final norm, which do not reach the U-Net."""
    unused = unused_layer(text_encoder)
    for name, parameter in text_encoder.named_parameters():
        if unused in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- their files


def describe(path: Path, key: str) -> Description:
    """Read headers and configs. Raises UserError (`key`) for other kinds of checkpoints."""
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; {_ADVICE}")
    return _describe_folder(path, key) if path.is_dir() else _describe_file(path, key)


def base_files(model: SDXLConfig) -> list[Path]:
    """Return the weight files that a config names."""
    path = Path(model.path or "")
    if model.path is None or not path.is_dir():
        return [] if model.path is None else [path]
    return [file for part in PARTS for file in _weight_files(path, part, "model.path")]


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
    shapes = _read_folder(path, key, PARTS, lambda file: read_header(file, key).tensors)
    configs = {part: _read_config(path / part / "config.json", key) for part in PARTS}
    factor, upcast = configs["vae"].get("scaling_factor"), configs["vae"].get("force_upcast", True)
    if not (isinstance(factor, float) and 0 < factor < math.inf and isinstance(upcast, bool)):
        raise UserError(
            f"{key}: {path / 'vae'} has scaling_factor {factor!r:.99} and force_upcast {upcast!r:.99}; SDXL's are "
            "0.13025 and true"
        )
    source = {"layout": "diffusers", "prediction_type": prediction, "zero_terminal_snr": rescaled}
    return Description(shapes, configs, {**source, "licence": _stated_licence(path / "README.md")})


def _read_folder(folder: Path, key: str, only: Collection[str], read: Callable[[Path], State]) -> dict[str, State]:
    """Return the tensors of parts; read: from a file to its tensors."""
    states: dict[str, State] = {}
    for part in only:
        state: State = {}
        for file in _weight_files(folder, part, key):
            state |= read(file)
        states[part] = from_folder(part, state)
    return states


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


def _stated_licence(card: Path) -> str | None:
    """Return the licence in the front matter of a model card, None where there is none."""
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as stream:
        found = re.match(r"---\n(?:(?!---).*\n)*?license: *(\S+)", stream.read(_MAX_CARD))
    return found and found[1][:_MAX_TEXT]


def _read_config(file: Path, key: str) -> dict[str, Any]:
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read ({str(error) or type(error).__name__}); {_ADVICE}") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} holds no JSON object; {_ADVICE}")
    return config
