"""What a task is built from, as a weight file states it; the file may come from a stranger."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from engine.task import Task
from engine.tasks.kind import Kind, Setup, find_kind
from models.predictor import wrong_metadata
from models.weights.fit import fit_state
from utils.errors import UserError


def check_weights(
    path: Path, key: str, shapes: Mapping[str, Tensor], metadata: dict[str, Any], kinds: Mapping[str, Kind]
) -> tuple[Kind, Setup]:
    """Return a weight file's kind, one of `kinds`, and setup, for the price of its header.

    shapes: its tensors on the meta device. Raises UserError (`key`) where the file is not of one of the kinds, or its
    metadata and its tensors do not fit together.
    """
    kind, setup = _read_setup(path, key, metadata, kinds)
    with torch.device("meta"):
        task = kind.build(setup)
    for name, state in split_networks(task, shapes).items():
        if missing := fit_state(task.get_submodule(name), state, keep_head=True, key=key).left:
            raise UserError(f"{key}: {path} lacks {', '.join(missing)}; export or train the file again")
    return kind, setup


def split_networks(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a weight file's tensors by exported network, under the network's own names."""
    networks = task.exported().networks
    if len(networks) == 1:
        return {networks[0]: dict(tensors)}
    return {
        network: {
            name.removeprefix(f"{network}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{network}.")
        }
        for network in networks
    }


def _read_setup(path: Path, key: str, metadata: dict[str, Any], kinds: Mapping[str, Kind]) -> tuple[Kind, Setup]:
    """Return a file's kind and setup. Raises UserError (`key`) that names the first wrong value of its metadata."""
    if "task" in metadata and metadata["task"] is None and metadata.get("output") == "features":
        raise UserError(
            f"{key}: {path} has features only, neither a head nor a task; load it with init_from={path}, or export the "
            "run without backbone_only"
        )
    if "task" not in metadata or "model" not in metadata or not isinstance(metadata["task"], dict):
        raise UserError(
            f"{key}: {path} was not written by a run of Atelier; name a run folder or such a file. Weights of others "
            f"become a run by: python finetune.py init_from={path} task.head=kept loop.total_steps=0 model=... "
            "augment=... data=... run_dir=... (docs/weights.md)"
        )
    kind = find_kind(metadata["task"].get("name"), f"{key}: {path}", kinds)
    kind.pipeline.check_metadata(path, key, {**metadata, "output": kind.output})
    try:
        model = TypeAdapter(kind.model_schema).validate_python(metadata["model"])
        task = kind.config.model_validate(metadata["task"])
    except ValidationError as error:
        raise wrong_metadata(path, key, error) from None
    facts = {name: metadata[name] for name in kind.fact_names if name in metadata}
    if missing := [name for name in kind.fact_names if name not in facts]:
        raise UserError(f"{key}: {path} names no {', '.join(missing)} in its metadata; make the file again")
    return kind, Setup(model, task, metadata.get("preprocessing", {}), facts)
