"""`init_from`: the initial weights of a training run, from a run, a file in any known layout, or timm."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from models.interop.foreign import describe, read_config_beside
from models.interop.metadata import dict_of
from models.weights.fit import StateFit, TimmFamily, family_of, fit_prefix, fit_state, is_meta, reverse_channels
from models.weights.layouts import recognise_state, strip_wrappers
from models.weights.timm_hub import filter_state, read_timm
from utils.contracts import InitFrom, State, Tensors
from utils.errors import UserError, about
from utils.io.files import Json, Values
from utils.io.hub import is_reference, stated_license
from utils.io.weight_files import find_initial
from utils.io.weights import hash_tensors, read_weights
from utils.record.logging import log

_MAX_TEXT = 200  # characters of a text from a file
# The licence of the weights released by facebookresearch/ConvNeXt-V2 (its README and issue 2). Its code is MIT.
RELEASED_LICENCE = "cc-by-nc-4.0"


@about("init_from")
def initialise_from(
    network: nn.Module,
    source: InitFrom,
    *,
    keep_head: bool,
    class_names: Sequence[str] | None = None,
    match: Callable[[State, Json, Path], State] | None = None,
) -> Json:
    """Load the weights named by `init_from` and return their origin.

    With `keep_head` and `class_names`, the file must have a head for these classes, and its rows are put into their
    order. If the file does not name its classes, their number must fit, and they are assumed to be in this order.
    match: of a tagger, what becomes of its head, from the tensors, metadata and path of the file. A network that takes
    BGR takes RGB here. On the meta device, only names and shapes are checked. Raises UserError that begins with
    `init_from:`, with `init_weights:` if the file lacks the requested average, or with `task.head:`.
    """
    metadata = {}
    if source.source == "timm":
        state, origin = read_timm(network)
    else:
        path = find_initial(source)
        tensors, metadata = read_weights(path, which=source.weights, shapes_only=is_meta(network))
        layout, state = convert_state(network, tensors)
        origin = _find_origin(source.source, path, "atelier" if "task" in metadata else layout, metadata)
        if not is_meta(network):
            origin["weights_hash"] = metadata.get("weights_hash") or hash_tensors(tensors)[:16]
        metadata = describe(path, metadata)
    if match is not None and "tag_names" in metadata:
        keep_head = True
        state = {**state, **match(state, metadata, path)}
    fit = fit_state(network, state, keep_head=keep_head)
    if keep_head and class_names is not None:
        known = None if source.source == "timm" else read_class_names(path, metadata)
        _keep_head(network, fit, origin["source"], known, class_names)
    if not is_meta(network):
        network.load_state_dict(fit.given, strict=False)
        if metadata.get("channels") == "BGR":
            reverse_channels(network)
    log.info(
        "init_from: %s, layout %s: %d tensors loaded; left at their initial values: %s; unused tensors of the file: %s",
        origin["source"], origin["layout"], len(fit.given), *(", ".join(names) or "none" for names in fit[1:]),
    )  # fmt: skip
    return origin


def convert_state(network: nn.Module, state: Tensors) -> tuple[str, State]:
    """Return the layout of a state, and the state under the names of a network.

    Our ConvNeXt V2 takes every layout of `recognise_state`. A timm network takes the layouts that timm converts, which
    include the official layout.
    """
    layout, official = recognise_state(state)
    if not isinstance(family_of(network), TimmFamily):
        return layout, official
    taken = strip_wrappers(state) if layout == "timm" else official
    return layout, filter_state(network, fit_prefix(taken, network.state_dict()))


def read_class_names(path: Path, metadata: Values) -> list[Any] | None:
    """Return the class names of a weight file, from its metadata or from timm's or transformers' config.json.

    Return None if the file does not name its classes, or only numbers them.
    """
    config = read_config_beside(path)
    labels = dict_of(config, "id2label")
    numbers = range(len(labels))
    names = metadata.get("class_names") or config.get("label_names") or [labels.get(str(index)) for index in numbers]
    if names in ([], [f"LABEL_{index}" for index in numbers]):
        return None
    return names if isinstance(names, list) else []


def _keep_head(network: nn.Module, fit: StateFit, source: str, known: list[Any] | None, wanted: Sequence[str]) -> None:
    """Put the rows of the file's head into the order of the run's classes.

    known: the file's class names, or None; wanted: the run's. Raises UserError (`task.head`) if the file has no head
    for these classes.
    """
    advice = "set task.head=random or fitted"
    head = family_of(network).head_prefixes
    if known is not None and (len(known) != len(wanted) or any(name not in known for name in wanted)):
        theirs, ours = (
            str([name for name in names if name not in others])[:_MAX_TEXT]
            for names, others in ((known, wanted), (wanted, known))
        )
        raise UserError(
            f"task.head: kept, but {source} has {len(known)} classes and this run {len(wanted)}: only in the file "
            f"{theirs}, only in this run {ours}; {advice}, or rename the folders to the file's "
            "classes. If only the names differ, name a copy of the file without class names (for model.safetensors, in "
            "a folder without its config.json): its classes are then taken in the order of the sorted folders"
        )
    if any(name.startswith(head) for name in fit.left):
        raise UserError(f"task.head: kept, but {source} has no head of these {len(wanted)} classes; {advice}")
    if known is not None:
        rows = [known.index(name) for name in wanted]
        fit.given.update({name: tensor[rows] for name, tensor in fit.given.items() if name.startswith(head)})


def _find_origin(source: str, path: Path, layout: str, metadata: Json) -> Json:
    """Return the origin of a file's weights, and log their licence, which also applies to weights trained from them.

    An origin has JSON values: `source` (file, or name in timm), `layout`, `license` (an identifier, or None: unknown).
    It has no `license` if the source is a run that began with random weights. The licence comes from the file's
    metadata, from config.json in the folders of timm and transformers, or from the model card of a folder or of a
    repository on the hub. A torch file with the layout and the single entry of Meta's released files is presumed to be
    one of them.
    """
    origin = {"source": source if is_reference(source) else str(path), "layout": layout}
    if "task" in metadata and "license" not in dict_of(metadata, "origin"):  # a run that began with random weights
        return origin
    licence, reason = _find_licence(source, path, layout, metadata)
    if not isinstance(licence, str) or licence == "unknown":
        log.info("licence of %s: not stated", path)
        return {**origin, "license": None}
    licence = licence[:_MAX_TEXT]
    log.warning("licence of %s: %s (%s); it applies to weights trained from these", path, licence, reason)
    return {**origin, "license": licence}


def _find_licence(source: str, path: Path, layout: str, metadata: Values) -> tuple[Any, str]:
    """Return the licence of a file, and the source of that statement."""
    stated = dict_of(metadata, "origin").get("license")
    if stated is not None or "task" in metadata:
        return stated, "the file states it"
    config = read_config_beside(path)
    if licence := config.get("license") or dict_of(config, "pretrained_cfg").get("license"):
        return licence, "its config.json states it"
    if (licence := stated_license(source)) is not None:
        return licence, "its model card states it"
    if layout == "official" and metadata.get("entries") == ["model"]:
        return RELEASED_LICENCE, "presumed: the file has the layout of the weights that Meta released"
    return None, ""
