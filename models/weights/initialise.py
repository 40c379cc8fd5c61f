"""`init_from`: the first weights of a training run, from a run, a file of any known layout, or timm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.weights.fit import Fit, fit_state, is_meta, load_into, optional_prefixes
from models.weights.layouts import recognise, refuse_v1, strip_wrappers
from models.weights.names import is_in_layout, translate
from models.weights.origin import find_origin
from models.weights.timm_filter import filter_state
from models.weights.timm_hub import load_timm
from utils.errors import UserError
from utils.io.weights import InitFrom, read_weights, refuse_average
from utils.record.logging import get_logger

log = get_logger(__name__)

_MAX_NAME = 120  # characters of a class name that a file brings


class Converted(NamedTuple):
    """A state under the names of a network; the layout that it had; and the names that have no place there."""

    layout: str
    state: dict[str, Tensor]
    removed: list[str]

    def load_into(self, network: nn.Module, *, keep_head: bool, key: str) -> Fit:
        """Load the state into the network; `dropped` of the result has the names that were removed before, too."""
        fit = load_into(network, self.state, keep_head=keep_head, key=key)
        return fit._replace(dropped=[*self.removed, *fit.dropped])


def initialise_from(
    network: nn.Module, source: InitFrom | None, *, keep_head: bool, class_names: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Give a network the weights that `init_from` names and return their origin; None leaves it as it is.

    With `keep_head` and `class_names`, the file must have a head of these classes; where it does not name its classes,
    as many. Of a network on the meta device, names and shapes are checked alone. Raises UserError that begins with
    `init_from:`, with `init_weights:` where an average is asked for and the file has none, or with `task.head:` for the
    head.
    """
    if source is None:
        return None
    if source.source == "timm":
        refuse_average(source.weights, "the weights of timm have no average beside them")
        fit, origin = load_timm(network, keep_head=keep_head)
        if keep_head and class_names is not None:
            _check_head(network, fit.left, Path(origin["source"]), None, class_names)
    else:
        path = source.find()
        found: dict[str, Any] = {}

        def check(shapes: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
            converted = convert(network, shapes, path, "init_from")
            found.update(layout=converted.layout)
            left = fit_state(network, converted.state, keep_head=keep_head).left
            if keep_head and class_names is not None:
                _check_head(network, left, path, metadata.get("class_names"), class_names)

        tensors, metadata = read_weights(path, "init_from", check, source.weights, shapes_only=is_meta(network))
        converted = convert(network, tensors, path, "init_from")
        fit = converted.load_into(network, keep_head=keep_head, key="init_from")
        _report_adapted(converted.state, fit)
        origin = find_origin(path, "atelier" if "task" in metadata else found["layout"], metadata)
    _report(origin, fit)
    return origin


def convert(network: nn.Module, state: Mapping[str, Tensor], path: Path, key: str) -> Converted:
    """Return a state under the names of a network.

    A ConvNeXt V2 of ours takes every layout of `recognise`; timm's takes them too, and any timm network what timm
    itself converts. Raises UserError (`key`) for a ConvNeXt V1 where a V2 is wanted.
    """
    layout, official = recognise(state)
    if isinstance(network, ConvNeXtV2 | FCMAE):
        refuse_v1(official, path, key)
        return Converted(layout, official, [])
    is_v2 = any(".grn." in name for name in official)
    if is_v2 and layout not in ("timm", "other") and is_in_layout(network.state_dict(), "timm"):
        encoder = _without_decoder(official)
        removed = [name for name in official if name not in encoder and name.removeprefix("encoder.") not in encoder]
        return Converted(layout, to_timm(encoder, network), removed)
    return Converted(layout, *filter_state(network, strip_wrappers(state)))


def to_timm(official: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a state under timm's names; a network of timm's that is small has its pointwise layers as convolutions."""
    state, wanted = translate(official, "official", "timm"), network.state_dict()
    for name, tensor in state.items():
        if ".mlp.fc" in name and name in wanted and tensor.shape == wanted[name].shape[:2]:
            state[name] = tensor.reshape(wanted[name].shape)
    return state


def _without_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder of an FCMAE, under names without the prefix; another state as it is."""
    inner = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    return inner or dict(state)


def _report_adapted(state: Mapping[str, Tensor], fit: Fit) -> None:
    """Log a first convolution that was given another number of input channels."""
    for name, tensor in fit.given.items():
        old = state.get(name, state.get(name.removeprefix("encoder."), tensor))
        if old.ndim == 4 and old.shape[1] != tensor.shape[1]:
            log.warning(
                "init_from: %s takes %d channels instead of %d: its weights are %s (docs/weights.md)",
                name, tensor.shape[1], old.shape[1], "summed" if tensor.shape[1] == 1 else "repeated and scaled",
            )  # fmt: skip


def _report(origin: Mapping[str, Any], fit: Fit) -> None:
    """Log what was loaded, and every tensor that was not; all names of those dropped in the file of the log."""
    log.info("init_from: %s, layout %s: %d tensors loaded", origin["source"], origin["layout"], len(fit.given))
    log.info("init_from: left at their initial values: %s", ", ".join(fit.left) or "none")
    log.info("init_from: dropped: %s", fit.describe_dropped())
    log.debug("init_from: all that is dropped: %s", ", ".join(fit.dropped))


def _check_head(network: nn.Module, left: Sequence[str], path: Path, known: Any, wanted: Sequence[str]) -> None:
    """Raise UserError (`task.head`) where a file has no head of the classes wanted.

    left: the names that keep their initial values; known: the classes that the file names, None where it names none.
    """
    advice = "set task.head=drawn or fitted"
    if known is not None and known != list(wanted):
        known = known if isinstance(known, list) else []
        pairs = enumerate(zip(known, wanted))
        index = next((index for index, (theirs, ours) in pairs if theirs != ours), min(len(known), len(wanted)))
        raise UserError(
            f"task.head: kept, but {path} is of {len(known)} classes and this run of {len(wanted)}, and class {index} "
            f"is {_name(known, index)} there and {_name(wanted, index)} here; {advice}, or give it the same classes in "
            "the same order"
        )
    if any(name.startswith(optional_prefixes(network)[0]) for name in left):
        raise UserError(f"task.head: kept, but {path} has no head of these {len(wanted)} classes; {advice}")


def _name(class_names: Sequence[Any], index: int) -> str:
    return repr(class_names[index])[:_MAX_NAME] if index < len(class_names) else "none"
