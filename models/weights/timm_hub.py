"""Load timm's weights by name, and call timm's converters of a network's files (`checkpoint_filter_fn`)."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.config import TimmConfig
from models.weights.fit import TimmFamily
from utils.contracts import State, Tensors
from utils.errors import UserError, reason_of
from utils.io.files import Json
from utils.record.logging import log

WEIGHTS = "model.safetensors"  # in a repository of timm on the hub
_CACHED = "models--timm--"  # begins the name of a repository's folder in the cache


def read_timm(network: nn.Module) -> tuple[State, Json]:
    """Return timm's weights for a timm network, and their origin.

    Raises UserError if the network is not timm's, has no weights there, or they are neither cached nor downloadable.
    """
    config = getattr(network, "pretrained_cfg", None)
    if not config:
        raise UserError(
            f"timm has weights for its own networks, not for {type(network).__name__}; set model=timm "
            "model.name=NAME, or give a weight file"
        )
    name = config["architecture"] + (f".{config['tag']}" if config.get("tag") else "")
    if not (config.get("url") or config.get("hf_hub_id") or config.get("file")):
        raise UserError(f"timm has no weights for {name}; with weights: {_list_tags(name)}")
    state = filter_state(network, load_timm(name).state_dict())  # positions are interpolated
    licence = config.get("license")
    log.warning("licence of timm's %s: %s; it applies to weights trained from these", name, licence)
    return state, {"source": f"timm {name}", "layout": "timm", "license": licence}


def find_config(name: str) -> Any:
    """Return timm's configuration of a network's weights, or None without weights of this name."""
    import timm

    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        return None


def _list_tags(name: str) -> str:
    import timm

    return ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")[:8]) or "none for that network"


def cached_file(name: str) -> str | None:
    """Return the path of a network's weights in timm's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(f"timm/{name}", WEIGHTS)
    return path if isinstance(path, str) else None


def cached_names() -> list[str]:
    """Return the networks of timm whose weights are in its cache and that take any image size, small files first."""
    from huggingface_hub import constants

    sizes = {}
    for folder in Path(constants.HF_HUB_CACHE).glob(f"{_CACHED}*"):
        name = folder.name.removeprefix(_CACHED)
        config = find_config(name)
        path = cached_file(name)
        if path is not None and config is not None and not config.fixed_input_size:
            sizes[name] = Path(path).stat().st_size
    return sorted(sizes, key=sizes.__getitem__)


def load_timm(name: str, **arguments: int) -> nn.Module:
    """Return a network of timm with its weights; the hub is not asked for cached ones.

    Raises UserError if they are neither cached nor downloadable.
    """
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            source = {"file": cached_file(name)}
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **arguments)
    except Exception as error:  # the hub's own classes: no network, no such file, a damaged cache
        raise UserError(
            f"timm's weights of {name} are not in its cache and cannot be downloaded ({reason_of(error)}); run "
            f"timm.create_model('{name}', pretrained=True) on a machine with internet access and copy the cache "
            "(HF_HOME), or give a weight file"
        ) from None


def filter_state(network: nn.Module, state: Tensors) -> State:
    """Convert a state by timm's converter for a network.

    Return the state unchanged if everything but the head fits already, if the network has no converter, or if the
    converter fails. In the last case, `refuse_misfits` will list the names that do not fit.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None or _shapes(network, state) == _shapes(network, network.state_dict()):
        return dict(state)
    try:
        return dict(convert(dict(state), network))
    except Exception as error:  # timm's converters raise many kinds of errors for unexpected names
        log.info("timm's converter failed, so the names are unchanged: %s: %s", type(error).__name__, error)
        return dict(state)


def stated_preprocessing(model: TimmConfig) -> Json:
    """Return the keys of `augment` that timm states for a network's weights.

    For one channel, mean and std are averaged, as in timm. Raises UserError if timm does not know the network, or if
    `augment` cannot express its preprocessing.
    """
    config = find_config(model.name)
    if config is None:
        raise UserError(f"timm has no weights named {model.name!r}; it has {_list_tags(model.name)}")
    known = config.crop_mode in ("center", "squash") and config.interpolation in ("bilinear", "bicubic")
    if not known or not 0 < config.crop_pct <= 1:
        raise UserError(
            f"timm prepares the images of {model.name} with crop_mode {config.crop_mode}, crop_pct "
            f"{config.crop_pct} and interpolation {config.interpolation}, which augment cannot express; choose "
            "another network, or set init_from=FILE (the weight file) and your own augment"
        )
    levels = {"mean": list(config.mean), "std": list(config.std)}
    if model.in_channels != len(config.mean):
        levels = {name: [sum(values) / len(values)] * model.in_channels for name, values in levels.items()}
    return {
        "image_size_hw": list(config.input_size[1:]),
        **levels,
        "eval_crop": float(config.crop_pct),
        "eval_resize": "squash" if config.crop_mode == "squash" else "crop",
        "interpolation": config.interpolation,
    }


def _shapes(network: nn.Module, state: Tensors) -> dict[str, torch.Size]:
    """Return the shapes of all tensors but the head's."""
    head = TimmFamily(network).head_prefixes
    return {name: tensor.shape for name, tensor in state.items() if not name.startswith(head)}
