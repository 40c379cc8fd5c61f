"""timm's own converters of a network's files (its `checkpoint_filter_fn`), and what they leave out."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.weights.fit import optional_prefixes
from utils.record.logging import get_logger

log = get_logger(__name__)


def filter_state(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state as timm's converter for a network makes it, and the names of which nothing is left.

    A state that fits but for the head stays as it is, as does that of a network without a converter, and one that the
    converter fails on: the table of names then says what does not fit.
    """
    own = dict(state)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None or _fits(network, own):
        return own, []
    sources = _Sources(own)
    try:
        with sources:
            converted = dict(convert(dict(own), network))
    except Exception as error:  # timm's converters raise errors of many kinds for names that they do not expect
        log.info("timm's converter failed, so the names stay as they are: %s: %s", type(error).__name__, error)
        return own, []
    used = set().union(*(sources.of(tensor) for tensor in converted.values()))
    return converted, [name for name in own if name not in used and name not in converted]


def _fits(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state has the names and shapes of a network; the head is not compared."""
    head = optional_prefixes(network)[0]

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(head)}

    return shapes(state) == shapes(network.state_dict())


class _Sources(TorchFunctionMode):
    """Note which named tensors each tensor was made of, such as a map that is resized or three that are joined."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = {}
        self._alive: list[Tensor] = []  # an id is of one tensor only as long as it lives
        for name, tensor in state.items():
            self._note(tensor, {name})

    def of(self, tensor: Any) -> set[str]:
        """Return the names of the tensors that a tensor was made of."""
        return self._names.get(id(tensor), set())

    def _note(self, tensor: Tensor, names: set[str]) -> None:
        self._alive.append(tensor)
        self._names[id(tensor)] = self.of(tensor) | names

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        names = set().union(*(self.of(tensor) for tensor in _tensors((args, kwargs))))
        if names:
            made = args[:1] if result is None else result  # x[i] = y returns nothing and writes into x
            for tensor in _tensors(made):
                self._note(tensor, names)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
