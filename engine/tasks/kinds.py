"""The table of kinds: task name -> names of classes, `module:Class`, which are imported when they are needed.

| name | script | rows | fields | output |
|---|---|---|---|---|
| classification | finetune.py, train.py | labelled images | labels | classes |
| tagging | finetune.py, train.py | images with tags | tags, unknown_tags | tags |
| regression | finetune.py, train.py | images with a number | labels, group | number |
| fcmae | pretrain_fcmae.py | all images | mask | features |
| diffusion | finetune_sdxl.py | captioned images | token_ids, is_dropped, strata, tags | none |
| autoencoder | finetune_vae.py | all images | none | none |
"""

from functools import reduce
from operator import or_
from pkgutil import resolve_name
from typing import Annotated, NamedTuple

from pydantic import Field, create_model

from data.layouts.names import is_remote
from data.layouts.walk import check_root
from engine.tasks.config import TaskTrainingConfig
from utils.config.entry_point import Command


class KindRow(NamedTuple):
    """A kind. config: the schema of its `task` group. scripts: they train it. schema: of their keys other than `task`.

    A schema imports no network and no torch, so that a wrong key is refused at once.
    """

    kind: str
    config: str
    scripts: tuple[str, ...] = ("train", "finetune")
    schema: str = "engine.tasks.config:ImageTrainingConfig"


KINDS = {
    "classification": KindRow(
        "engine.tasks.classification:ClassificationKind", "engine.tasks.config:ClassificationTaskConfig"
    ),
    "tagging": KindRow("engine.tasks.tagging:TaggingKind", "engine.tasks.config:TaggingTaskConfig"),
    "regression": KindRow("engine.tasks.regression:RegressionKind", "engine.tasks.config:RegressionTaskConfig"),
    "fcmae": KindRow("engine.tasks.fcmae:FCMAEKind", "engine.tasks.config:FCMAETaskConfig", ("pretrain_fcmae",)),
    "diffusion": KindRow(
        "sdxl.kind:DiffusionKind",
        "sdxl.config:DiffusionTaskConfig",
        ("finetune_sdxl",),
        "sdxl.config:SDXLTrainingConfig",
    ),
    "autoencoder": KindRow(
        "sdxl.autoencoder:AutoencoderKind",
        "sdxl.config:AutoencoderTaskConfig",
        ("finetune_vae",),
        "sdxl.config:VAETrainingConfig",
    ),
}


def training_schema(script: str) -> type[TaskTrainingConfig]:
    """Return the schema of a root script: that of its kinds, with the union of their tasks, chosen by `name`."""
    rows = [row for row in KINDS.values() if script in row.scripts]
    task = reduce(or_, [resolve_name(row.config) for row in rows])
    if len(rows) > 1:
        task = Annotated[task, Field(discriminator="name")]
    return create_model(f"conf/{script}.yaml", __base__=resolve_name(rows[0].schema), task=(task, ...))


def training_command(script: str) -> Command[TaskTrainingConfig]:
    """Return the command of a root script that trains."""
    return Command(script, "engine.train:train", training_schema(script), check=_check_root)


def _check_root(config: TaskTrainingConfig) -> None:
    if config.data.name != "glyphs" and not is_remote(config.data.root):
        check_root(config.data.root)  # as reading it does, but before torch is imported
