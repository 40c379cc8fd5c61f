"""Loading a state into a network: strictly, or not at all.

A wrong name or shape stops the run before a tensor is touched. GRN weights that are silently skipped, for instance,
cost several points of accuracy (the GRN ablations of Woo et al. 2023, arXiv 2301.00808).
"""

import re
from collections.abc import Mapping
from textwrap import indent
from typing import NamedTuple

from torch import Tensor, nn

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from models.weights.layouts import describe_held
from utils.errors import UserError
from utils.record.logging import get_logger
from utils.text_table import align_columns

log = get_logger(__name__)

# Anchored: a layer whose name merely contains `pred` or `proj` is not part of the decoder.
_FCMAE_ONLY = re.compile(r"^(decoder\..+|mask_token|proj\.(weight|bias)|pred\.(weight|bias))$")
_MAX_ROWS = 20
_ENCODER = "encoder."
_ADVICE = (
    "Set the model group (model.name, for timm with the image size as in vit_tiny_patch16_384; model.in_channels, "
    "model.depths, model.dims, model.stem_stride) to what the checkpoint was trained with, or name another file."
)


class Fit(NamedTuple):
    """How a state fits a network.

    given: what to load, by the network's names. left: names that keep their initial values.
    """

    given: dict[str, Tensor]
    left: list[str]


def load_into(network: nn.Module, state: Mapping[str, Tensor], *, keep_head: bool) -> Fit:
    """Copy a state into a freshly built network, as `fit_state` says, which raises before anything is changed.

    A network on the meta device takes nothing.
    """
    fit = fit_state(network, state, keep_head=keep_head)
    if not is_meta(network):
        network.load_state_dict(fit.given, strict=False)
    return fit


def is_meta(network: nn.Module) -> bool:
    """Return whether a network is on the meta device, as in a dry run."""
    return any(parameter.is_meta for parameter in network.parameters())


def fit_state(network: nn.Module, state: Mapping[str, Tensor], *, keep_head: bool) -> Fit:
    """Return which tensors of a state a network takes; they may be on the meta device.

    A classifier takes the encoder of an FCMAE. An FCMAE takes an encoder, or that of a classifier, and keeps its own
    decoder. The head stays at its initial values if `keep_head` is false, or if the state has no head or one of another
    shape. So does the final norm if the state has none. A stem may have other input channels (`_adapt_channels`).

    Raises UserError with a table of every other name that is missing, unexpected, of a wrong shape or of
    another kind of number.
    """
    wanted = network.state_dict()
    found = _fit_prefix(state, wanted)
    for name in first_convolutions(network):
        if name in found and name in wanted:
            found[name] = _adapt_channels(name, found[name], wanted[name])
    head, norm = optional_prefixes(network)
    head_names, norm_names = ({name for name in wanted if name.startswith(prefixes)} for prefixes in (head, norm))
    left = set()
    if not keep_head or not all(name in found and found[name].shape == wanted[name].shape for name in head_names):
        left |= head_names
    if not any(name in found for name in norm_names):
        left |= norm_names
    # Tensors of a group that keeps its values, or that this network does not have, are ignored.
    ignored = {name for name in found if name in left or (name not in wanted and name.startswith(head + norm))}
    given = {name: tensor for name, tensor in found.items() if name not in ignored}
    refuse_misfits(given, {name: tensor for name, tensor in wanted.items() if name not in left})
    return Fit(given, [name for name in wanted if name in left])


def _fit_prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the encoder's prefix and the decoder, or add the prefix, as the network wants it."""
    theirs, ours = (any(name.startswith(_ENCODER) for name in names) for names in (state, wanted))
    if theirs and not ours:
        return {name.removeprefix(_ENCODER): state[name] for name in state if not _FCMAE_ONLY.match(name)}
    if ours and not theirs:
        return {_ENCODER + name: state[name] for name in state if not name.startswith(("head.", "norm."))}
    return dict(state)


def _adapt_channels(name: str, weight: Tensor, wanted: Tensor) -> Tensor:
    """Give the first convolution's weights [O, I, h, w] the network's number of input channels.

    For one channel they are summed over I, so that a grey image gives what its three equal channels gave. For any other
    number they are repeated in turn and scaled by I / new, which keeps the scale of the output.
    Source: huggingface/pytorch-image-models:timm/models/_manipulate.py adapt_input_conv, which has the same rule.
    """
    old, new = weight.shape[1] if weight.ndim == 4 else 0, wanted.shape[1]
    if old in (0, new) or weight.shape[0] != wanted.shape[0] or weight.shape[2:] != wanted.shape[2:]:
        return weight
    if not weight.is_meta:
        done = "summed" if new == 1 else "repeated and scaled"
        log.warning("%s takes %d channels instead of %d: its weights are %s (docs/weights.md)", name, new, old, done)
    if new == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, -(-new // old), 1, 1)[:, :new] * (old / new)


def first_convolutions(network: nn.Module) -> list[str]:
    """Return the names of the weights that read the images; none where timm does not state them."""
    if isinstance(network, ConvNeXtV2 | FCMAE):
        return [f"{_ENCODER if isinstance(network, FCMAE) else ''}downsample_layers.0.0.weight"]
    first = getattr(network, "pretrained_cfg", {}).get("first_conv") or ()  # timm: one name or several
    return [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)]


def optional_prefixes(network: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the prefixes of the head, or decoder, and of the final norm: the only names that may stay unloaded."""
    if isinstance(network, ConvNeXtV2):
        return ("head.",), ("norm.",)
    if isinstance(network, FCMAE):
        return (), ("decoder.", "mask_token", "proj.", "pred.")
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier") or ()  # timm: one name or several
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    # An encoder that was pretrained alone lacks the norm that timm's ConvNeXts have in their head.
    return tuple(f"{name}." for name in names), ("head.norm.",) if "head.fc" in names else ()


def refuse_misfits(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: str = "the checkpoint", advice: str = ""
) -> None:
    """Raise UserError unless both have the same names and shapes, and numbers of one kind."""
    rows = []
    for name in [*wanted, *(name for name in given if name not in wanted)]:
        has = str(tuple(given[name].shape)) if name in given else "missing"
        wants = str(tuple(wanted[name].shape)) if name in wanted else "unexpected"
        if has == wants and not (given[name].is_floating_point() and wanted[name].is_floating_point()):
            has, wants = f"{has} {given[name].dtype}", f"{wants} {wanted[name].dtype}"  # any floats are of one kind
        if has != wants:
            rows.append((name, has, wants))
    if not rows:
        return
    shown = [("name", "in the checkpoint", "in the network"), *rows[:_MAX_ROWS]]
    table = indent(align_columns(shown), "  ")
    more = f"\n  ... and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
    if not advice:
        held = describe_held(given)
        advice = f"The checkpoint is of {held}: set that, or name another file." if held else _ADVICE
    raise UserError(f"{len(rows)} of the tensors of {file} do not fit the network:\n{table}{more}\n{advice}")
