"""A model from a weight file that says nothing about itself: network and preprocessing come from the configuration.

This is how a released file is measured (evaluate.py) and converted (export.py) without a run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.config import AugmentConfig
from engine.tasks.classification import ClassificationTask, ClassificationTaskConfig
from engine.tasks.kind import Setup
from engine.tasks.kinds import KINDS
from engine.tasks.pretrained import stated_preprocessing
from engine.tasks.rebuild import Rebuilt
from models.build import build_network
from models.config import ModelConfig, TimmConfig
from models.image_model import ImageModel
from models.normalise import Normalise
from models.weights.fit import fit_state, load_into, optional_prefixes
from models.weights.initialise import convert
from models.weights.origin import find_origin
from models.weights.timm_hub import load_timm
from utils.errors import UserError
from utils.io.weights import find_weights, read_weights
from utils.record.logging import get_logger

log = get_logger(__name__)

_MAX_CLASSES = 10**6  # that a file may claim
# The classification that a foreign file is measured as; what trains it is not known.
_TASK = ClassificationTaskConfig(
    name="classification", label_smoothing=0.0, mixup_alpha=0.0, cutmix_alpha=0.0, mix_probability=0.0,
    mix_switch_probability=0.0, allow_missing_classes=True, head="kept",
)  # fmt: skip


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
            return self.augment.preprocessing(self.model.in_channels)
        if not isinstance(self.model, TimmConfig):
            raise UserError(
                "augment: must be given, because a weight file does not say how its images were prepared; the "
                "published files: augment=randaugment, and from 384 px up also augment.image_size_hw=[384,384] "
                "augment.eval_resize=squash"
            )
        return {**stated_preprocessing(self.model), "channels": self.model.in_channels}


def open_foreign(source: ForeignSource) -> tuple[ImageModel, dict[str, Any]]:
    """Return the model of a foreign file, in eval mode, and metadata as a weight file of ours has them.

    Its output is `classes` where the file has a head, else `features`. Classes are named as in the configuration beside
    the file, or by their numbers. Raises UserError (`weights`, with a table of misfits).
    """
    preprocessing = source.preprocessing()
    if source.weights == "timm":
        network, origin, names = _open_timm(source.model)
    else:
        network, origin, names = _open_file(source)
    output = "classes" if names else "features"
    normalise = Normalise(preprocessing["mean"], preprocessing["std"], source.model.in_channels)
    metadata = {
        "task": _TASK.model_dump() if names else None,
        "model": source.model.model_dump(),
        "preprocessing": preprocessing,
        "output": output,
        "step": 0,
        "origin": origin,
        **({"class_names": names} if names else {}),
    }
    return ImageModel(network, normalise, output).eval(), metadata


def rebuild_foreign(source: ForeignSource, class_names: Sequence[str]) -> Rebuilt:
    """Return a classification task of a foreign file, whose classes are those of the collection, in their order.

    Raises UserError (`weights`) where the file has no head of as many classes.
    """
    model, metadata = open_foreign(source)
    found = len(metadata.get("class_names", ()))
    if found != len(class_names):
        raise UserError(
            f"weights: {source.weights} has {f'a head of {found} classes' if found else 'no head'}, and the collection "
            f"has {len(class_names)} classes; give the collection that it was trained on (data.root)"
        )
    facts = {"class_names": list(class_names)}
    setup = Setup(source.model, _TASK, metadata["preprocessing"], facts)
    with torch.device("meta"):
        task = ClassificationTask(setup)
    task.network, task.normalise = model.network, setup.normalise()
    return Rebuilt(KINDS["classification"], task.eval(), setup, metadata, source.weights)


def _open_timm(model: ModelConfig) -> tuple[nn.Module, dict[str, Any], list[str]]:
    import timm

    if not isinstance(model, TimmConfig):
        raise UserError(f"weights: timm has none for {model.name}; set model=timm model.name={model.name}")
    classes = timm.get_pretrained_cfg(model.name).num_classes if timm.is_model(model.name) else 0
    network = build_network(model, num_classes=classes)
    _, origin = load_timm(network, keep_head=True)
    return network, origin, [str(index) for index in range(classes)]


def _open_file(source: ForeignSource) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Read a file into a network with as many classes as its head has."""
    path = find_weights(source.weights, "best", "weights")
    found: dict[str, Any] = {}

    def check(shapes: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        with torch.device("meta"):
            probe = build_network(source.model, num_classes=1)
            layout, state = convert(probe, shapes, path, "weights")
            found["classes"] = _count_classes(probe, state)
            found["layout"] = "atelier" if "task" in metadata else layout
            network = build_network(source.model, num_classes=found["classes"])
        left = fit_state(network, state, keep_head=True, key="weights").left
        if found["classes"] and left:
            raise UserError(f"weights: {path} lacks {', '.join(left)}; it is not a whole classifier")

    tensors, metadata = read_weights(path, "weights", check, source.which)
    network = build_network(source.model, num_classes=found["classes"])
    fit = load_into(network, convert(network, tensors, path, "weights")[1], keep_head=True, key="weights")
    log.info("weights: %s, layout %s; dropped: %s", path, found["layout"], ", ".join(fit.dropped) or "none")
    names = metadata.get("class_names") or names_beside(path, found["classes"])
    if len(names) != found["classes"]:
        names = [str(index) for index in range(found["classes"])]
    return network, find_origin(path, found["layout"], metadata), list(names)


def _count_classes(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return the rows of the head's weights in a state; 0 without a head."""
    for prefix in optional_prefixes(network)[0]:
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.ndim >= 1 and f"{prefix}bias" in state:
            return min(weight.shape[0], _MAX_CLASSES)
    return 0


def names_beside(path: Path, count: int) -> list[str]:
    """Return the class names that a folder's config.json states (timm's and transformers'), or none."""
    file = path.parent / "config.json"
    if path.name not in ("model.safetensors", "pytorch_model.bin") or not file.is_file():
        return []
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        names = stated.get("label_names") or [stated["id2label"][str(index)] for index in range(count)]
        return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
