"""timm's weights by a network's name, and timm's own converters of a network's files (its `checkpoint_filter_fn`)."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.fit import first_convolutions, optional_prefixes
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)


def read_timm(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return timm's weights for a timm network, without a head of other classes; and their origin.

    Raises UserError where the network is not timm's, has no weights there, or they cannot be had.
    """
    import timm

    stated = getattr(network, "pretrained_cfg", None)
    if not stated:
        raise UserError(
            f"timm has weights for its own networks, not for {type(network).__name__}; set model=timm "
            "model.name=NAME, or give a weight file"
        )
    name = stated["architecture"] + (f".{stated['tag']}" if stated.get("tag") else "")
    if not (stated.get("url") or stated.get("hf_hub_id") or stated.get("file")):
        tags = ", ".join(timm.list_pretrained(f"{stated['architecture']}.*")[:8]) or "none"
        raise UserError(f"timm has no weights for {name}; with weights: {tags}")
    stems = first_convolutions(network)
    channels = network.get_parameter(stems[0]).shape[1] if stems else 3
    try:
        with torch.random.fork_rng(devices=[]):
            loaded = timm.create_model(name, pretrained=True, num_classes=network.num_classes, in_chans=channels)
    except Exception as error:  # the hub's own classes: no network, no such file, a damaged cache
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"timm's weights of {name} are not in its cache and cannot be downloaded ({first}); run "
            f"timm.create_model('{name}', pretrained=True) where there is a network and copy the cache (HF_HOME), or "
            "give a weight file"
        ) from None
    state, licence = filter_state(network, loaded.state_dict()), stated.get("license")  # positions are interpolated
    if stated.get("num_classes") != network.num_classes:  # timm has drawn the head
        head = optional_prefixes(network)[0]
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    log.warning("licence of timm's %s: %s; it applies to what is trained from these weights", name, licence)
    return state, {"source": f"timm {name}", "layout": "timm", "licence": licence}


def filter_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state as timm's converter for a network makes it.

    A state that fits but for the head stays as it is, as does that of a network without a converter, and one that the
    converter fails on: the table of names then says what does not fit.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    head = optional_prefixes(network)[0]
    theirs, ours = (
        {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(head)}
        for tensors in (state, network.state_dict())
    )
    if convert is None or theirs == ours:
        return dict(state)
    try:
        return dict(convert(dict(state), network))
    except Exception as error:  # timm's converters raise errors of many kinds for names that they do not expect
        log.info("timm's converter failed, so the names stay as they are: %s: %s", type(error).__name__, error)
        return dict(state)
