"""Reading the weights of an earlier run into a network: strictly, or not at all.

A wrong name or shape stops the run before a tensor is touched. GRN weights that are silently skipped, for instance,
cost several points of accuracy (the GRN ablations of Woo et al. 2023, arXiv 2301.00808).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.convnextv2 import ConvNeXtV2
from utils.errors import UserError
from utils.io.weights import find_weights, read_weights
from utils.record.logging import get_logger

log = get_logger(__name__)

# Anchored: a layer whose name merely contains `pred` or `proj` is not part of the decoder.
_FCMAE_ONLY = re.compile(r"^(decoder\..+|mask_token|proj\.(weight|bias)|pred\.(weight|bias))$")
_GRN = re.compile(r"(^|\.)grn\.(gamma|beta)$")
_MAX_ROWS = 20
_MAX_NAME = 120  # characters of a class name that a file brings


def load_into(network: nn.Module, state: Mapping[str, Tensor], *, keep_head: bool) -> list[str]:
    """Copy the weights of an own checkpoint into a freshly built network and return the names left as they were.

    state: of a classifier, or of an FCMAE, of which the encoder is taken and the decoder ignored. The head stays at
    its initial values if `keep_head` is false, or if the checkpoint has none or one of another shape; so does the
    final norm of a ConvNeXt V2 if the checkpoint has none. GRN tensors may have 1, 2 or 4 axes.

    Raises UserError (`init_from`) with a table of every other name that is missing, unexpected, of a wrong shape or of
    another kind of number; the network is then unchanged.
    """
    given, left = _fit(network, state, keep_head)
    network.load_state_dict(given, strict=False)
    return left


def check_fit(network: nn.Module, shapes: Mapping[str, Tensor], *, keep_head: bool) -> list[str]:
    """Return and raise what `load_into` would, for tensors on the meta device: before a file's tensors are read."""
    return _fit(network, shapes, keep_head)[1]


def _fit(network: nn.Module, state: Mapping[str, Tensor], keep_head: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Return what to load of a state, and the names that keep their values; raises as `load_into`."""
    wanted = network.state_dict()
    found = _fit_grn(_take_encoder(state, wanted), wanted)
    head, norm = _optional_prefixes(network)
    left = set()
    for prefixes, keep in ((head, keep_head), (norm, True)):
        group = {name for name in wanted if name.startswith(prefixes)}
        same_shapes = all(name in found and found[name].shape == wanted[name].shape for name in group)
        absent = not any(name in found for name in group)
        if not keep or absent or (prefixes == head and not same_shapes):
            left |= group
    # Tensors of a group that keeps its values, or that this network does not have, are ignored.
    given = {
        name: tensor
        for name, tensor in found.items()
        if name not in left and (name in wanted or not name.startswith(head + norm))
    }
    _refuse_misfits(given, {name: tensor for name, tensor in wanted.items() if name not in left})
    return given, [name for name in wanted if name in left]


def _take_encoder(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the encoder out of the state of an FCMAE, unless the network is one itself; leave other states alone."""
    prefix = "encoder."
    if not any(name.startswith(prefix) for name in state) or any(name.startswith(prefix) for name in wanted):
        return dict(state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if not _FCMAE_ONLY.match(name)}


def _fit_grn(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give GRN tensors of shape (C), (1, C) or (1, 1, 1, C) the shape that the network wants."""
    fitted = dict(state)
    for name, tensor in state.items():
        if not (_GRN.search(name) and name in wanted):
            continue
        channels = wanted[name].shape[-1]
        if tuple(tensor.shape) in {(channels,), (1, channels), (1, 1, 1, channels)}:
            fitted[name] = tensor.reshape(wanted[name].shape)
    return fitted


def _optional_prefixes(network: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the prefixes of the head and of the final norm, the only names that may stay unloaded."""
    if isinstance(network, ConvNeXtV2):
        return ("head.",), ("norm.",)
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier") or ()  # timm: one name or several
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names), ()


def _refuse_misfits(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError with a table unless both have the same names and shapes, and numbers of one kind."""
    rows = []
    for name in [*wanted, *(name for name in given if name not in wanted)]:
        has = str(tuple(given[name].shape)) if name in given else "missing"
        wants = str(tuple(wanted[name].shape)) if name in wanted else "unexpected"
        if name in given and name in wanted and not _are_of_one_kind(given[name].dtype, wanted[name].dtype):
            has, wants = (f"{text} {made[name].dtype}" for text, made in ((has, given), (wants, wanted)))
        if has != wants:
            rows.append((name, has, wants))
    if not rows:
        return
    shown = [("name", "in the checkpoint", "in the network"), *rows[:_MAX_ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    table = "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown)
    more = f"\n  ... and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
    raise UserError(
        f"init_from: {len(rows)} of the checkpoint's tensors do not fit the network:\n{table}{more}\n"
        "Set the model group (model.name, model.depths, model.dims, model.in_channels, model.stem_stride) to what the "
        "checkpoint was trained with, or name another file in init_from."
    )


def _are_of_one_kind(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Tell whether numbers may be copied: floating point of any precision into floating point, else the same dtype."""
    return given == wanted or (given.is_floating_point and wanted.is_floating_point)


def initialise_from(
    network: nn.Module, source: str | None, *, keep_head: bool, class_names: Sequence[str] | None = None
) -> None:
    """Give a network the weights of a run or a file (`init_from`); None leaves it as it is.

    With `keep_head` and `class_names`, the file must have a head of these classes; where it does not name its classes,
    as many. Raises UserError that begins with `init_from:`, or with `task.head:` for the head.
    """
    if source is None:
        return
    path = find_weights(source, "last", "init_from")

    def check(shapes: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        left = check_fit(network, shapes, keep_head=keep_head)
        if keep_head and class_names is not None:
            _check_head(network, left, path, metadata.get("class_names"), class_names)

    state, _ = read_weights(path, "init_from", check)
    fresh = load_into(network, state, keep_head=keep_head)
    log.info("init_from: %s; left at their initial values: %s", path, ", ".join(fresh) or "none")


def _check_head(network: nn.Module, left: Sequence[str], path: Path, known: Any, wanted: Sequence[str]) -> None:
    """Raise UserError (`task.head`) where a file has no head of the classes wanted.

    left: what `check_fit` returned; known: the classes that the file names, None where it names none.
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
    if any(name.startswith(_optional_prefixes(network)[0]) for name in left):
        raise UserError(f"task.head: kept, but {path} has no head of these {len(wanted)} classes; {advice}")


def _name(class_names: Sequence[Any], index: int) -> str:
    return repr(class_names[index])[:_MAX_NAME] if index < len(class_names) else "none"
