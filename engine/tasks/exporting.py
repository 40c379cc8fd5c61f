"""What export.py opens and measures: a model from one weight file or the mean of several, and a file's accuracy."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from engine.tasks.foreign import ForeignSource, open_foreign
from engine.tasks.rebuild import Rebuilt, rebuild_task
from models.build import build_network
from models.config import ConvNeXtV2Config
from models.fcmae import FCMAE
from models.image_model import ImageModel
from models.weights.fit import load_into
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.weights import read_weights, write_weights
from utils.record.logging import get_logger

log = get_logger(__name__)

_SHOWN_CHARACTERS = 120  # of a value in a message


# Values of `model` that act in training alone, so that weights of runs that differ in them have a mean.
_TRAINING_KEYS = ("drop_path_rate", "head_init_scale", "pretrained")


@contextmanager
def averaged(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield a weight file with the mean of several, under the metadata of the first and the licences of all.

    Of one file, it is the file itself. Integers, such as counts of batches, are the first file's. Raises UserError
    (`weights`) where names or shapes of tensors differ, or task, network, classes or preprocessing.
    """
    if len(paths) == 1:
        yield paths[0]
        return
    first, metadata = read_weights(paths[0], "weights")
    total, origins = {name: tensor.double() for name, tensor in first.items()}, [metadata.get("origin")]
    for path in paths[1:]:
        state, other = read_weights(path, "weights")
        wrong = [name for name in {**first, **state} if name not in state or name not in first
                 or state[name].shape != first[name].shape]  # fmt: skip
        if wrong:
            raise UserError(
                f"weights: {path} and {paths[0]} are not of one network, so they have no mean: {len(wrong)} tensors "
                f"differ ({', '.join(sorted(wrong)[:3])}); name weights of one recipe"
            )
        _refuse_other_meaning((paths[0], metadata), (path, other))
        origins.append(other.get("origin"))
        for name, tensor in state.items():
            total[name] += tensor.double()
    mean = {
        name: (total[name] / len(paths)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
    log.info("weights: the mean of %s", ", ".join(map(str, paths)))
    with tempfile.TemporaryDirectory(prefix="atelier-average-") as folder:
        path = Path(folder) / "average.safetensors"
        merged = {"origin": origin} if (origin := merge_origins(origins)) else {}
        write_weights(path, mean, {**metadata, **merged, "averaged": [str(path) for path in paths]})
        yield path


def _refuse_other_meaning(first: tuple[Path, dict[str, Any]], other: tuple[Path, dict[str, Any]]) -> None:
    """Raise UserError (`weights`) where two files' outputs or inputs do not mean the same; names the first such key."""
    (first_path, ours), (path, theirs) = ((path, _meaning(metadata)) for path, metadata in (first, other))
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            shown = [repr(values.get(key))[:_SHOWN_CHARACTERS] for values in (ours, theirs)]
            raise UserError(
                f"weights: {first_path} and {path} have no mean, because {key} differs: {shown[0]} in the first, "
                f"{shown[1]} in the second; name weights of runs with the same task, network, classes and preprocessing"
            )


def _meaning(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what gives a weight file's tensors their meaning, by dotted key."""
    found = {key: metadata.get(key) for key in ("class_names", "tag_names", "frozen")}
    task, model, preprocessing = (
        value if isinstance(value := metadata.get(key), dict) else {} for key in ("task", "model", "preprocessing")
    )
    found |= {f"model.{key}": value for key, value in model.items() if key not in _TRAINING_KEYS}
    found |= {f"preprocessing.{key}": value for key, value in {"eval_resize": "crop", **preprocessing}.items()}
    return {"task.name": task.get("name"), **found}


def merge_origins(origins: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return one origin that names each source, layout and licence; None where no weights came from elsewhere.

    A source whose licence is not known makes `unknown` one of the licences.
    """
    known = [origin for origin in origins if isinstance(origin, dict)]
    distinct = [origin for index, origin in enumerate(known) if origin not in known[:index]]
    if len(distinct) < 2:
        return distinct[0] if distinct else None
    return {
        key: " and ".join(dict.fromkeys(str(origin.get(key) or "unknown") for origin in distinct))
        for key in ("source", "layout", "licence")
    }


class Opened(NamedTuple):
    """What is exported: the model; the whole network of its file (an FCMAE with its decoder, say); metadata of a weight
    file, with `output`; and the task, where the file is ours.
    """

    model: ImageModel
    whole: nn.Module
    metadata: dict[str, Any]
    rebuilt: Rebuilt | None = None

    def with_licence(self, licence: str | None) -> Self:
        """Return the same with a licence of the source weights; None leaves what is known of it."""
        if licence is None:
            return self
        origin = {**(self.metadata.get("origin") or {}), "licence": licence}
        return self._replace(metadata={**self.metadata, "origin": origin})


def open_own(path: Path) -> Opened:
    """Open a weight file of ours. Raises UserError (`weights`) where the task has no output for one image."""
    rebuilt = rebuild_task(path)
    if rebuilt.kind.output is None:
        name = rebuilt.metadata["task"]["name"]
        raise UserError(f"weights: {path} is of task {name!r}, which has no output for one image; see evaluate.py")
    whole = getattr(rebuilt.task, "network", None)
    model = rebuilt.image_model()
    metadata = {**rebuilt.metadata, "output": rebuilt.kind.output}
    return Opened(model, whole if isinstance(whole, FCMAE) else model.network, metadata, rebuilt)


def open_other(source: ForeignSource) -> Opened:
    """Open a weight file that is not ours."""
    model, metadata = open_foreign(source)
    return Opened(model, model.network, metadata)


def without_head(opened: Opened) -> Opened:
    """Return the backbone: the network without head and final norm, whose output is the mean of the last map.

    A network of timm gives its pooled features; where it pools a map and norms the result, that norm is left out too.
    The metadata name no task, because a file of these weights has none: it is for `init_from`.
    """
    model, metadata = opened.model, opened.metadata
    network = model.network
    if hasattr(network, "reset_classifier"):
        _remove_timm_head(network)
    elif getattr(network, "num_classes", 0):
        backbone = build_network(ConvNeXtV2Config.model_validate(metadata["model"]), num_classes=0)
        load_into(backbone, network.state_dict(), keep_head=False)
        network = backbone
    kept = {key: value for key, value in metadata.items() if key not in ("class_names", "tag_names")}
    backbone = ImageModel(network, model.normalise, "features").eval()
    return Opened(backbone, network, {**kept, "task": None, "output": "features"})


def _remove_timm_head(network: nn.Module) -> None:
    """Remove a timm network's classifier, and the norm behind the pool, which timm's `reset_classifier` leaves."""
    from timm.layers import NormMlpClassifierHead

    network.reset_classifier(0)
    if isinstance(head := getattr(network, "head", None), NormMlpClassifierHead):
        head.reset(0, reset_other=True)


def read_images(loader: Iterable[Batch], count: int) -> Iterator[np.ndarray]:
    """Yield up to `count` readable images of a loader as float32 batches in [0, 1]."""
    left = count
    for batch in loader:
        images = batch["images"][batch["weight"] > 0][:left].cpu()
        left -= len(images)
        if len(images):
            yield to_unit(images)
        if left <= 0:
            return


def to_unit(images: Tensor) -> np.ndarray:
    """Return uint8 images as float32 in [0, 1]."""
    return images.cpu().numpy().astype(np.float32) / 255.0


@torch.inference_mode()
def measure_loss(
    model: ImageModel, predict: Callable[[np.ndarray], list[np.ndarray]], loader: Iterable[Batch]
) -> dict[str, float]:
    """Compare a file's outputs with PyTorch's over all readable images of a loader, on the CPU.

    For classes: top-1 of both, where images have labels, and the share of images whose first class is the same. For
    tags and features: the mean cosine similarity of the outputs.
    """
    images = labelled = 0
    sums = {"torch": 0.0, "file": 0.0, "same": 0.0}
    for batch in loader:
        valid = (batch["weight"] > 0).cpu()
        pictures = batch["images"].cpu()[valid]
        if not len(pictures):
            continue
        wanted = model(pictures)[0]
        found = torch.from_numpy(predict(to_unit(pictures))[0])
        images += len(pictures)
        if model.output != "classes":
            sums["same"] += float(torch.cosine_similarity(wanted, found, dim=1).sum())
            continue
        sums["same"] += float((wanted.argmax(1) == found.argmax(1)).sum())
        if "labels" in batch:
            labels = batch["labels"].cpu()[valid]
            labelled += len(labels)
            sums["torch"] += float((wanted.argmax(1) == labels).sum())
            sums["file"] += float((found.argmax(1) == labels).sum())
    if images == 0:
        raise UserError("data.root: no image of the validation split could be read, so the loss is not known")
    report = {"images": float(images), "agreement": sums["same"] / images}
    if labelled:
        report |= {"top1_fp32": sums["torch"] / labelled, "top1": sums["file"] / labelled}
        report["top1_loss"] = report["top1_fp32"] - report["top1"]
    return report
