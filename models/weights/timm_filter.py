"""timm's own converters of a network's files (its `checkpoint_filter_fn`)."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.weights.fit import optional_prefixes
from utils.record.logging import get_logger

log = get_logger(__name__)


def filter_state(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state as timm's converter makes it, and the names that it dropped, or joined under another name.

    The state stays as it is if it fits except for the head, if the network has no converter, and if the converter
    fails: loading then shows a table of what does not fit.
    """
    own = dict(state)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None or _fits(network, own):
        return own, []
    try:
        converted = dict(convert(dict(own), network))
    except Exception as error:  # timm's converters raise errors of many kinds for names that they do not expect
        log.info("timm's converter failed, so the names stay as they are: %s: %s", type(error).__name__, error)
        return own, []
    kept = set(map(id, converted.values()))
    return converted, [name for name, tensor in own.items() if name not in converted and id(tensor) not in kept]


def _fits(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether a state has the names and shapes of a network, the head aside."""
    head = optional_prefixes(network)[0]

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(head)}

    return shapes(state) == shapes(network.state_dict())
