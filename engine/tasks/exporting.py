"""What export.py opens: a model from one weight file, or from the mean of several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from engine.tasks.foreign import ForeignSource, open_foreign
from engine.tasks.image_exports import IMAGE_EXPORTS
from engine.tasks.kind import Export, Opened
from engine.tasks.rebuild import rebuild_task
from models.build import build_network
from models.config import ConvNeXtV2Config
from models.fcmae import FCMAE
from models.image_model import ImageModel
from models.outputs import NAME_KEYS
from models.weights.fit import load_into
from utils.canvas import DEFAULT
from utils.errors import UserError, close_names
from utils.io.files import output_errors
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
    with TemporaryDirectory(prefix="atelier-") as folder:
        path = Path(folder) / "average.safetensors"
        merged = {"origin": origin} if (origin := merge_origins(origins)) else {}
        with output_errors("TMPDIR", path):
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
    found = {key: metadata.get(key) for key in (*sorted(NAME_KEYS), "frozen")}
    task, model, preprocessing = (
        value if isinstance(value := metadata.get(key), dict) else {} for key in ("task", "model", "preprocessing")
    )
    found |= {f"model.{key}": value for key, value in model.items() if key not in _TRAINING_KEYS}
    preprocessing = {"pad": "none", "eval_resize": "crop", "background": DEFAULT, "icc": False, **preprocessing}
    found |= {f"preprocessing.{key}": value for key, value in preprocessing.items()}
    return {"task.name": task.get("name"), **found}


def merge_origins(origins: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return one origin that names each source, layout and licence; None where no weights came from elsewhere.

    A source of unknown licence makes `unknown` one of the licences; one that began with drawn weights adds none.
    """
    known = [origin for origin in origins if isinstance(origin, dict)]
    distinct = [origin for index, origin in enumerate(known) if origin not in known[:index]]
    if len(distinct) < 2:
        return distinct[0] if distinct else None
    return {
        key: " and ".join(dict.fromkeys(str(origin[key] or "unknown") for origin in distinct if key in origin))
        for key in ("source", "layout", "licence")
        if any(key in origin for origin in distinct)
    }


def open_own(path: Path) -> Opened:
    """Open a weight file of ours. Raises UserError (`weights`) where its task has no export."""
    rebuilt = rebuild_task(path)
    if not rebuilt.kind.exports:
        raise UserError(f"weights: {path} is of task {rebuilt.metadata['task']['name']!r}, which has no export")
    whole = getattr(rebuilt.task, "network", None)
    if rebuilt.kind.output is None:
        return Opened(None, whole, rebuilt.metadata, rebuilt)
    model = rebuilt.image_model()
    metadata = {**rebuilt.metadata, "output": rebuilt.kind.output}
    return Opened(model, whole if isinstance(whole, FCMAE) else model.network, metadata, rebuilt)


def open_other(source: ForeignSource) -> Opened:
    """Open a weight file that is not ours."""
    model, metadata = open_foreign(source)
    return Opened(model, model.network, metadata)


def find_export(name: str, opened: Opened) -> Export:
    """Return a format of what was opened. Raises UserError (`format`) where it has no such format."""
    exports = IMAGE_EXPORTS if opened.rebuilt is None else opened.rebuilt.kind.exports
    if name not in exports:
        raise UserError(f"format: {name!r} is no format of these weights; {close_names(name, exports)}")
    return exports[name]


def of_one_size(opened: Opened) -> Opened:
    """Return the same for programs that show images of one size, padded to a square.

    Raises UserError (`weights`) for predictions of a network that was trained in buckets.
    """
    stated = opened.metadata.get("preprocessing", {})
    if stated.get("buckets_hw") is None:
        return opened
    if opened.metadata["output"] != "features":
        raise UserError(
            "weights: they were trained on images of several shapes (augment.pad=buckets), and programs that load an "
            "export show images in a square, where such a network is wrong far more often; predict with predict.py, or "
            "train on: python finetune.py init_from=RUN augment.pad=square"
        )
    alone = {name: value for name, value in stated.items() if name != "buckets_hw"}
    return opened._replace(metadata={**opened.metadata, "preprocessing": alone})


def without_head(opened: Opened) -> Opened:
    """Return the backbone: the network without head and final norm, whose output is the mean of the last map.

    A network of timm gives its pooled features; where it pools a map and norms the result, that norm is removed too.
    The metadata name no task, because a file of these weights has none: it is for `init_from`.
    """
    model, metadata = opened.model, opened.metadata
    if model is None:
        raise UserError("backbone_only: true, but this task has no network on single images; set backbone_only=false")
    network = model.network
    if hasattr(network, "reset_classifier"):
        _remove_timm_head(network)
    elif getattr(network, "num_classes", 0):
        backbone = build_network(ConvNeXtV2Config.model_validate(metadata["model"]), num_classes=0)
        load_into(backbone, network.state_dict(), keep_head=False)
        network = backbone
    kept = {key: value for key, value in metadata.items() if key not in NAME_KEYS}
    backbone = ImageModel(network, model.normalise, "features").eval()
    return Opened(backbone, network, {**kept, "task": None, "output": "features"})


def _remove_timm_head(network: nn.Module) -> None:
    """Remove a timm network's classifier, and the norm behind the pool, which timm's `reset_classifier` leaves."""
    from timm.layers import NormMlpClassifierHead

    network.reset_classifier(0)
    if isinstance(head := getattr(network, "head", None), NormMlpClassifierHead):
        head.reset(0, reset_other=True)
