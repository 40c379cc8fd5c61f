"""Load a state into a network strictly.

A wrong name or shape stops the run before any tensor is changed. Skipping GRN weights silently, for instance, would
cost several points of accuracy (the GRN ablations of Woo et al. 2023, arXiv 2301.00808).
"""

from collections.abc import Sequence
from textwrap import indent
from typing import Any, NamedTuple

from torch import Tensor, nn

from utils.contracts import State, Tensors
from utils.errors import UserError
from utils.record.figures import align_columns
from utils.record.logging import log

_MAX_ROWS = 20
_ENCODER = "encoder."
_ADVICE = (
    "Set the model group (model.name, for timm with the image size as in vit_tiny_patch16_384; model.in_channels, "
    "model.depths, model.dims, model.stem_stride) to what the checkpoint was trained with, or name another file."
)


class StateFit(NamedTuple):
    """How a state fits a network."""

    given: State  # the tensors to load, under the network's names
    left: list[str]  # the network's names that are not in `given`
    unused: list[str]  # the names of the fitted state that are not in `given`


def is_meta(network: nn.Module) -> bool:
    """Return whether a network is on the meta device, as in a dry run."""
    return any(parameter.is_meta for parameter in network.parameters())


def fit_state(network: nn.Module, state: Tensors, *, keep_head: bool) -> StateFit:
    """Return which tensors of a state a network takes; they may be on the meta device.

    A classifier takes the tensors below `encoder.` of a pretraining method. An FCMAE takes an encoder, alone or from a
    classifier, and keeps its own decoder. The head keeps its initial values if `keep_head` is false, or if the state
    has no head of the same shape. The final norm does so if the state has none. A stem may have other input channels
    (`_adapt_channels`).

    Raises UserError with a table of all other names that are missing or unexpected, or have another shape or kind of
    number.
    """
    target = network.state_dict()
    tensors = fit_prefix(state, target)
    family = family_of(network)
    for name in family.first_convolutions:
        if name in tensors and name in target:
            tensors[name] = _adapt_channels(name, tensors[name], target[name])
    head, norm = family.head_prefixes, family.norm_prefixes
    head_names = {name for name in target if name.startswith(head)}
    norm_names = {name for name in target if name.startswith(norm)}
    left = set()
    if not keep_head or not all(name in tensors and tensors[name].shape == target[name].shape for name in head_names):
        left |= head_names
    if not any(name in tensors for name in norm_names):
        left |= norm_names
    # Ignore tensors of a head or norm that keeps its values, or that this network does not have.
    ignored = {name for name in tensors if name in left or (name not in target and name.startswith(head + norm))}
    given = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    refuse_misfits(given, {name: tensor for name, tensor in target.items() if name not in left})
    return StateFit(given, [name for name in target if name in left], sorted(ignored))


def fit_prefix(state: Tensors, target: Tensors) -> State:
    """Take the encoder of a pretraining without its prefix, or add the prefix, to match the network."""
    has_encoder = any(name.startswith(_ENCODER) for name in state)
    needs_encoder = any(name.startswith(_ENCODER) for name in target)
    if has_encoder and not needs_encoder:
        fitted = {name: name.removeprefix(_ENCODER) for name in state if name.startswith(_ENCODER)}
    elif needs_encoder and not has_encoder:
        fitted = {name: _ENCODER + name for name in state if not name.startswith(("head.", "norm."))}
    else:
        return dict(state)
    if others := [name for name in state if name not in fitted]:
        log.info("init_from: the encoder alone is loaded; not used: %s", ", ".join(others))
    return {new: state[name] for name, new in fitted.items()}


def _adapt_channels(name: str, weight: Tensor, target: Tensor) -> Tensor:
    """Give the first convolution's weights [O, I, h, w] the network's number of input channels.

    By timm: for one channel, they are summed over I, so that a grey image gives the same output as three equal
    channels. For any other number, they are repeated in turn and scaled by I / new, which keeps the output's scale.
    """
    old = weight.shape[1] if weight.ndim == 4 else 0
    new = target.shape[1]
    if old in (0, new) or weight.shape[0] != target.shape[0] or weight.shape[2:] != target.shape[2:]:
        return weight
    if not weight.is_meta:
        change = "summed" if new == 1 else "repeated and scaled"
        log.warning("%s takes %d channels instead of %d: its weights are %s (docs/weights.md)", name, new, old, change)
    from timm.models import adapt_input_conv  # takes 0.8 s

    return adapt_input_conv(new, weight, base_chans=old)


class TimmFamily:
    """What timm states about the weights of a network; ConvNeXtV2 and FCMAE have the same attributes.

    first_convolutions: the names of the weights that read the images. head_prefixes, norm_prefixes: of the head
    and the final norm, which a state may lack. All are empty if timm does not state them.
    """

    def __init__(self, network: nn.Module) -> None:
        config = getattr(network, "pretrained_cfg", {})
        heads = _as_tuple(config.get("classifier"))
        self.first_convolutions = tuple(f"{name}.weight" for name in _as_tuple(config.get("first_conv")))
        self.head_prefixes = tuple(f"{name}." for name in heads)
        # An encoder that was pretrained alone lacks the norm that timm's ConvNeXts have in their head.
        self.norm_prefixes = ("head.norm.",) if "head.fc" in heads else ()


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def family_of(network: nn.Module) -> Any:
    """Return the attributes of TimmFamily for a network; a network of ours has them itself."""
    return network if hasattr(network, "head_prefixes") else TimmFamily(network)


def reverse_channels(network: nn.Module) -> None:
    """Let a network take BGR in place of RGB, or RGB in place of BGR. Raises UserError if its stem is not known."""
    names = family_of(network).first_convolutions
    if not names:
        raise UserError(f"the first convolution of {type(network).__name__} is not known, so it cannot take BGR")
    for name in names:
        weight = network.get_parameter(name)
        weight.data = weight.data.flip(1)


def refuse_misfits(given: Tensors, wanted: Tensors, file: str = "the checkpoint", advice: str = _ADVICE) -> None:
    """Raise UserError unless both have the same names, shapes and kinds of numbers."""
    rows = []
    for name in [*wanted, *(name for name in given if name not in wanted)]:
        has = str(tuple(given[name].shape)) if name in given else "missing"
        wants = str(tuple(wanted[name].shape)) if name in wanted else "unexpected"
        if has == wants and not (given[name].is_floating_point() and wanted[name].is_floating_point()):
            has = f"{has} {given[name].dtype}"  # all floats are one kind
            wants = f"{wants} {wanted[name].dtype}"
        if has != wants:
            rows.append((name, has, wants))
    if not rows:
        return
    table = indent(align_columns([("name", "in the checkpoint", "in the network"), *rows[:_MAX_ROWS]]), "  ")
    more = f"\n  ... and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
    raise UserError(f"{len(rows)} of the tensors of {file} do not fit the network:\n{table}{more}\n{advice}")
