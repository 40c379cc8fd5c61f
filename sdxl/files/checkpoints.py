"""Write SDXL for other programs: a single file, for ComfyUI and the web UIs, or a diffusers folder.

    StableDiffusionXLPipeline.from_pretrained(FOLDER)
    StableDiffusionXLPipeline.from_single_file(FILE, config=FOLDER)

diffusers ignores a single file's markers: without the folder's scheduler config, it assumes epsilon prediction.
Source: Stability-AI/ModelSpec:README.md (1.0.1), kohya-ss/sd-scripts:library/train_util.py,
comfyanonymous/ComfyUI:comfy/supported_models.py.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdxl.files.family import PARTS, PREDICTIONS, PREFIXES, Networks
from sdxl.files.names import part_state, to_single_file
from sdxl.pictures.sampling import scheduler_config
from sdxl.vae import fold_values
from utils.contracts import State, Tensors
from utils.io.files import write_json
from utils.io.weights import weight_metadata, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"  # ModelSpec's implementation of single files


def write_modelspec(path: Path, tensors: Tensors, facts: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    """Write a file with facts for ModelSpec.

    facts: `title`, `architecture` and `implementation`, which are required, `prediction_type` as diffusers names it,
    and `license`, `author`, `date`, `resolution`, ..., without ModelSpec's prefix; facts of sd-scripts have `ss_`.
    metadata: for other programs.
    """
    facts = {**facts, "sai_model_spec": "1.0.1"}
    if prediction := facts.pop("prediction_type", None):
        facts["prediction_type"] = PREDICTIONS[prediction].names[0]
    own = {name if name.startswith("ss_") else f"modelspec.{name}": text for name, text in facts.items()}
    write_tensors(path, tensors, {**metadata, **own})


def save_single_file(
    path: Path, networks: Networks, *, dtype: torch.dtype, facts: Mapping[str, str], **noise: Any
) -> None:
    """Write a single file in `dtype` (for the VAE, see `cast_state`): all networks, or the VAE alone, for ComfyUI.

    facts: for `write_modelspec`, with a `title`. noise: arguments of `scheduler_config`, for all networks.
    The VAE's values are folded into its tensors; the header keeps its padding, which other programs do not read.
    """
    tensors = {}
    for part, network in networks.items():
        tensors |= to_single_file(part, cast_state(part, network, dtype, folds=True))
    architecture = "stable-diffusion-xl-v1-base"
    if "unet" not in networks:
        architecture += "/vae"
        tensors = {name.removeprefix(PREFIXES["vae"]): tensor for name, tensor in tensors.items()}
    prediction = noise.get("prediction_type", "")
    facts = {**facts, "architecture": architecture, "implementation": GENERATIVE_MODELS, "prediction_type": prediction}
    if prediction == "flow":
        facts["ss_discrete_flow_shift"] = str(noise.get("shift", 1.0))
    if prediction == "v_prediction":
        tensors["v_pred"] = torch.empty(0)
        if noise["zero_terminal_snr"]:
            tensors["ztsnr"] = torch.empty(0)
    padding = networks["vae"].config.get("padding_mode")
    own = {} if padding is None else {"vae": {"padding_mode": padding}}
    write_modelspec(path, tensors, facts, {"format": "pt", **weight_metadata(own, tensors)})


def save_pipeline(
    folder: Path,
    networks: Networks,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtype: torch.dtype,
    zeros_for_empty_prompt: bool,
    **noise: Any,
) -> None:
    """Write a diffusers folder. model_index.json, which identifies it, is written last.

    noise: arguments of `scheduler_config`.
    tokenizer: from `build_tokenizer`; the second encoder's copy gets its own padding, "!" (id 0).
    zeros_for_empty_prompt: pipelines use zeros instead of encoding an empty negative prompt.
    """
    import diffusers

    classes = {}
    for part in PARTS:
        save_part(folder / part, part, networks[part], dtype)
        classes[part] = [type(networks[part]).__module__.partition(".")[0], type(networks[part]).__name__]
    second = copy.deepcopy(tokenizer)
    second.pad_token = "!"
    for name, written in (("tokenizer", tokenizer), ("tokenizer_2", second)):
        written.save_pretrained(folder / name)
        classes[name] = ["transformers", "CLIPTokenizer"]
    scheduler = scheduler_config(**noise)
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "add_watermarker": False,
        "force_zeros_for_empty_prompt": zeros_for_empty_prompt,
        **classes,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_json(folder / "model_index.json", index)


def save_part(folder: Path, part: str, network: nn.Module, dtype: torch.dtype) -> None:
    """Write a network into a folder of its own, as `from_pretrained(FOLDER)` of its class reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    if part.startswith("text"):
        network.config.save_pretrained(folder)
    else:
        network.save_config(folder)
    write_tensors(folder / f"{PARTS[part].file}.safetensors", cast_state(part, network, dtype), {"format": "pt"})


def cast_state(part: str, network: nn.Module, dtype: torch.dtype, *, folds: bool = False) -> State:
    """Return the state of a network in a dtype. A VAE that overflows in float16, such as SDXL's, stays in float32.

    folds: with the VAE's values in its tensors.
    """
    state = part_state(part, network)
    if part == "vae":
        state = fold_values(network, state) if folds else state
        if dtype == torch.float16 and network.config.force_upcast:
            dtype = torch.float32
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
