"""Read the kind, the setup and the metadata of the task that wrote a weight file."""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name

import torch
from pydantic import TypeAdapter

from data.augment.config import AugmentConfig
from engine.task import split_exported
from engine.tasks.change import AnyConfig
from engine.tasks.config import TaggingTaskConfig
from engine.tasks.kind import Kind, Setup, open_kind
from engine.tasks.kinds import KINDS
from models.image_model import Graph
from models.interop.foreign import describe
from models.interop.metadata import dict_of
from models.predictor import Predictor, check_metadata
from models.weights.fit import refuse_misfits
from utils.config.help import read_option
from utils.contracts import InitFrom
from utils.errors import UserError, about, close_names
from utils.io.files import Json, readable
from utils.io.weight_files import find_initial
from utils.io.weights import read_weights, restore_paths
from utils.record.logging import log
from utils.record.run_reader import run_of


def read_setup(path: Path, moved: Mapping[str, str], graph: Predictor | None = None) -> tuple[Kind, Setup, Json]:
    """Return the kind, the setup and the metadata of a weight file, from its header alone.

    moved: keys of `model` that have another value now. graph: the file, if it is an ONNX file of classes or tags. The
    file may come from a stranger. Raises UserError that names the first missing or wrong value of the metadata, or
    tensors that do not fit the metadata.
    """
    if graph is None:
        shapes, metadata = read_weights(path, shapes_only=True)
        metadata = describe(path, metadata)
    else:
        metadata = {"form": None, **graph.metadata, "model": {}}
    is_foreign = "form" in metadata
    if is_foreign:
        metadata["task"] = read_option("task", "classification" if metadata["output"] == "classes" else "tagging")
        if metadata["output"] == "tags":
            metadata["task"]["rating_s"] = "sensitive"  # as Danbooru's taggers
            metadata["old_tags"] = []  # so that tags that a collection does not speak of are unknown
    if run := run_of(path):
        try:
            metadata = restore_paths(metadata, run.config)
        except UserError as error:  # the weights of most kinds need no path
            log.warning("%s", error)
    for key, value in moved.items():
        if dict_of(metadata, "model").get(key) is None:
            raise UserError(f"model.{key}: {path} has none; remove model.{key}")
        metadata["model"] = {**metadata["model"], key: value}
    if "model" not in metadata or not dict_of(metadata, "task"):
        raise UserError(
            f"{path} states no network: it is no run's, and no tagger with timm's config.json beside it. A classifier "
            f"of others becomes a run: python finetune.py init_from={path} task.head=kept loop.total_steps=0 model=... "
            "augment=... data=... run_dir=... (docs/weights.md)"
        )
    name = metadata["task"].get("name")
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"{path} is of an unknown task {name!r}; {close_names(str(name), KINDS)}")
    kind = open_kind(name)
    if missing := [fact for fact in kind.names if fact not in metadata]:
        raise UserError(f"{path} states no {missing[0]}; name its run, or make the file again")
    if kind.output is not None:
        check_metadata(path, {**metadata, "output": kind.output})
    with readable(path, "weight"):
        model = Graph(graph) if graph else TypeAdapter(kind.model).validate_python(metadata["model"])
        config = resolve_name(KINDS[name].config).model_validate(metadata["task"])
    facts = {name: metadata[name] for name in (*kind.names, *kind.optional_names) if name in metadata}
    setup = Setup(model, config, metadata.get("preprocessing", {}), facts)
    if is_foreign:  # its tensors have other names
        return kind, setup, metadata
    with torch.device("meta"):
        task = kind.build(setup)
    expected, _ = split_exported(task, task.state_dict())
    refuse_misfits(shapes, expected, str(path), "Export or train the file again.")
    return kind, setup, metadata


def read_tagger(path: Path) -> Json:
    """Return the metadata of a tagger, ours or another's. Raises UserError for another file."""
    metadata = describe(path, read_weights(path, shapes_only=True)[1])
    check_metadata(path, {**metadata, "output": "tags"})
    return metadata


def initial_metadata(config: AnyConfig) -> Json:
    """Return the metadata of the weight file in `init_from`, ours or another's."""
    path = find_initial(InitFrom(config.init_from, config.init_weights))
    return describe(path, read_weights(path, shapes_only=True)[1])


@about("init_from")
def stated_by_tagger(config: AnyConfig) -> Json:
    """Return the keys that a tagger in `init_from` states for another tagger: its network and preprocessing."""
    if not isinstance(config.task, TaggingTaskConfig):
        return {}
    tagger = initial_metadata(config)
    if not {"tag_names", "model"} <= tagger.keys():
        return {}
    stated = dict_of(tagger, "preprocessing")
    changes = {f"augment.{key}": stated[key] for key in AugmentConfig.model_fields.keys() & stated}
    return {**changes, "data.background": stated.get("background"), "model": tagger["model"]}
