"""A model from a weight file that says nothing about itself: network and preprocessing come from the configuration.

This is how a released file is measured (evaluate.py) and converted (export.py) without a run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.cache.size import preprocessing_of
from data.collection import Collection
from data.config import AugmentConfig
from engine.tasks.kind import Rebuilt, Setup
from engine.tasks.kinds import FOREIGN
from engine.tasks.pretrained import stated_preprocessing
from models.build import build_network
from models.config import ModelConfig, TimmConfig
from models.image_model import ImageModel
from models.normalise import Normalise
from models.outputs import OUTPUTS
from models.weights.fit import fit_state, optional_prefixes
from models.weights.initialise import convert
from models.weights.origin import find_origin
from models.weights.timm_hub import load_timm
from utils.errors import UserError
from utils.io.folder_config import read_config_beside
from utils.io.weights import find_weights, read_weights, refuse_average
from utils.record.logging import get_logger

log = get_logger(__name__)

_MAX_CLASSES = 10**6  # that a file may claim
_SHOWN_CHARACTERS = 60  # of a class name
_NAMES = OUTPUTS[FOREIGN.output].names_key
# timm and transformers train and serve on convert("RGB").
DROPPED = {"background": "drop"}


def check_average(which: Literal["model", "ema"], model: ModelConfig | None) -> None:
    """Raise ValueError where `init_weights` asks for the average of weights that are ours: `model` is not stated."""
    if which == "ema" and model is None:
        raise ValueError(
            "init_weights: ema is read for torch checkpoints that are not ours, with model=...; of a run, set "
            "weights=ema and init_weights=model"
        )


class ForeignSource(NamedTuple):
    """Weights that say nothing about themselves.

    weights: a file, a folder or `timm`. model, augment: network and preprocessing, as the user states them. which: of a
    torch checkpoint, the weights or their average.
    """

    weights: str
    model: ModelConfig
    augment: AugmentConfig | None
    which: Literal["model", "ema"]

    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing; without `augment`, what timm states. Raises UserError where neither is known."""
        if self.augment is not None:
            return {**preprocessing_of(self.augment, self.model.in_channels), **DROPPED}
        if not isinstance(self.model, TimmConfig):
            raise UserError(
                "augment: must be given, because a weight file does not say how its images were prepared; the "
                "published files: augment=randaugment, and from 384 px up also augment.image_size_hw=[384,384] "
                "augment.eval_resize=squash"
            )
        advice = "say how to prepare them: augment=light with augment.eval_crop and the other keys"
        return {**stated_preprocessing(self.model, "augment", advice), "channels": self.model.in_channels, **DROPPED}


def open_foreign(source: ForeignSource) -> tuple[ImageModel, dict[str, Any]]:
    """Return the model of a foreign file, in eval mode, and metadata as a weight file of ours has them.

    Its output is that of the kind FOREIGN where the file has a head, else `features`. Outputs are named as in the file
    or in the configuration beside it, or by their numbers (`numbered_classes` in the metadata). Raises UserError
    (`weights`), with a table of misfits.
    """
    preprocessing = source.preprocessing()
    if source.weights == "timm":
        network, origin, names, numbered = _open_timm(source)
    else:
        network, origin, names, numbered = _open_file(source)
    output = FOREIGN.output if names else "features"
    normalise = Normalise(preprocessing["mean"], preprocessing["std"], source.model.in_channels)
    metadata = {
        "task": FOREIGN.foreign.model_dump() if names else None,
        "model": source.model.model_dump(),
        "preprocessing": preprocessing,
        "output": output,
        "step": 0,
        "origin": origin,
        **({_NAMES: names, "numbered_classes": numbered} if names else {}),
    }
    return ImageModel(network, normalise, output).eval(), metadata


def rebuild_foreign(source: ForeignSource, collection: Collection) -> Rebuilt:
    """Return a task of a foreign file, whose outputs are those of a collection.

    Their order is the file's where it names its outputs, and sorted where it only numbers them. Raises UserError
    (`weights`) where the file has no head of as many outputs, or names others.
    """
    model, metadata = open_foreign(source)
    names = _order_classes(source.weights, metadata, FOREIGN.output_names(collection))
    metadata = {**metadata, _NAMES: names, "numbered_classes": False}
    setup = Setup(source.model, FOREIGN.foreign, metadata["preprocessing"], {_NAMES: names})
    with torch.device("meta"):
        task = FOREIGN.build(setup)
    task.network, task.normalise = model.network, setup.normalise()
    return Rebuilt(FOREIGN, task.eval(), setup, metadata, source.weights)


def _order_classes(weights: str, metadata: Mapping[str, Any], wanted: list[str]) -> list[str]:
    """Return the classes of a collection in the order of a file's outputs, or raise as `rebuild_foreign` says."""
    names = metadata.get(_NAMES, [])
    same = sorted(names) == sorted(wanted)
    if same and not metadata["numbered_classes"]:
        return names
    if names and not same and not metadata["numbered_classes"] and names != _numbers(len(names)):
        missing, unknown = ([name for name in a if name not in b] for a, b in ((wanted, names), (names, wanted)))
        raise UserError(
            f"weights: {weights} names other classes than the collection: {len(unknown)} are only in the file "
            f"({_shorten(unknown)}), {len(missing)} only in the collection ({_shorten(missing)}). Rename the folders "
            "of data.root to the file's names; or, if only the names differ and the file's order is that of the sorted "
            "folders, give a copy of the file without names (of model.safetensors, away from its config.json)"
        )
    if len(names) != len(wanted):
        raise UserError(
            f"weights: {weights} has {f'a head of {len(names)} classes' if names else 'no head'}, and the collection "
            f"has {len(wanted)} classes; give the collection that it was trained on (data.root)"
        )
    log.info("weights: %s does not name its classes; they are taken for the collection's, in sorted order", weights)
    return wanted


def _numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:_SHOWN_CHARACTERS]) for name in names[:3])
    return (shown + (", ..." if len(names) > 3 else "")) or "none"


class _File(NamedTuple):
    """A network with the weights of a file, their origin, and its classes; numbered: the file does not name them."""

    network: nn.Module
    origin: dict[str, Any]
    class_names: list[str]
    numbered: bool


def _open_timm(source: ForeignSource) -> _File:
    import timm

    model = source.model
    if not isinstance(model, TimmConfig):
        raise UserError(f"weights: timm has none for {model.name}; set model=timm model.name={model.name}")
    refuse_average(source.which, "the weights of timm have no average beside them")
    classes = timm.get_pretrained_cfg(model.name).num_classes if timm.is_model(model.name) else 0
    network = build_network(model, num_classes=classes)
    _, origin = load_timm(network, keep_head=True)
    return _File(network, origin, _numbers(classes), numbered=True)


def _open_file(source: ForeignSource) -> _File:
    """Read a file into a network with as many classes as its head has."""
    path = find_weights(source.weights, "best", "weights")
    found: dict[str, Any] = {}

    def check(shapes: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        with torch.device("meta"):
            probe = build_network(source.model, num_classes=1)
            converted = convert(probe, shapes, path, "weights")
            found["classes"] = _count_classes(probe, converted.state)
            found["layout"] = "atelier" if "task" in metadata else converted.layout
            network = build_network(source.model, num_classes=found["classes"])
        left = fit_state(network, converted.state, keep_head=True, key="weights").left
        if found["classes"] and left:
            raise UserError(f"weights: {path} lacks {', '.join(left)}; it is not a whole classifier")

    tensors, metadata = read_weights(path, "weights", check, source.which)
    network = build_network(source.model, num_classes=found["classes"])
    fit = convert(network, tensors, path, "weights").load_into(network, keep_head=True, key="weights")
    log.info("weights: %s, layout %s; dropped: %s", path, found["layout"], fit.describe_dropped())
    names = _stated_names(path, metadata, found["classes"])
    origin = find_origin(path, found["layout"], metadata)
    return _File(network, origin, names or _numbers(found["classes"]), numbered=not names)


def _stated_names(path: Path, metadata: Mapping[str, Any], count: int) -> list[str]:
    """Return the names of a file's classes, from its metadata or the configuration beside it; `[]` without names.

    Raises UserError (`weights`) where the names are not as many as the classes.
    """
    if count == 0 or metadata.get("numbered_classes"):
        return []
    names = metadata.get(_NAMES) or names_beside(path)
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) == count):
        length = len(names) if isinstance(names, list) else type(names).__name__
        raise UserError(
            f"weights: {path} has a head of {count} classes, but the names given for them are {length}; correct "
            f"{_NAMES} in its metadata, or label_names or id2label in config.json beside it"
        )
    return names if names != [f"LABEL_{index}" for index in range(count)] else []  # as transformers numbers them


def _count_classes(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return the rows of the head's weights in a state; 0 without a head."""
    for prefix in optional_prefixes(network)[0]:
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.ndim >= 1 and f"{prefix}bias" in state:
            return min(weight.shape[0], _MAX_CLASSES)
    return 0


def names_beside(path: Path) -> list[str]:
    """Return the class names that a folder's config.json states (timm's and transformers'), or none."""
    stated = read_config_beside(path)
    labels = stated.get("id2label") or {}
    try:
        names = stated.get("label_names") or [labels[str(index)] for index in range(len(labels))]
        return [str(name) for name in names]
    except (KeyError, TypeError) as error:
        log.warning("the class names in config.json beside %s are ignored: %r", path, error)
        return []
