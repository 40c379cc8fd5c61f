"""The table of kinds: task name -> Kind.

| name | script | rows | fields | output |
|---|---|---|---|---|
| classification | finetune.py, train.py | labelled images | labels | classes |
| tagging | finetune.py, train.py | images with tags | tags, unknown_tags | tags |
| distillation | finetune.py, train.py | all images | none | the teacher's, or features |
| fcmae | pretrain_fcmae.py | all images | mask | features |
| diffusion | finetune_sdxl.py | captioned images | token_ids, is_dropped, strata, tags | none |
| autoencoder | finetune_vae.py | all images | none | none |
"""

from functools import reduce
from operator import or_
from typing import Annotated

from pydantic import Field, create_model

from engine.tasks.classification import ClassificationKind
from engine.tasks.distillation import DistillationKind
from engine.tasks.fcmae import FCMAEKind
from engine.tasks.kind import Kind, TaskTrainingConfig
from engine.tasks.tagging import TaggingKind
from sdxl.autoencoder import AutoencoderKind
from sdxl.kind import DiffusionKind

KINDS: dict[str, Kind] = {
    "classification": ClassificationKind(),
    "tagging": TaggingKind(),
    "distillation": DistillationKind(),
    "fcmae": FCMAEKind(),
    "diffusion": DiffusionKind(),
    "autoencoder": AutoencoderKind(),
}


def training_schema(script: str) -> type[TaskTrainingConfig]:
    """Return the schema of a root script: that of its kinds, with the union of their tasks, chosen by `name`."""
    kinds = [kind for kind in KINDS.values() if script in kind.scripts]
    task = reduce(or_, [kind.config for kind in kinds])
    if len(kinds) > 1:
        task = Annotated[task, Field(discriminator="name")]
    return create_model(f"conf/{script}.yaml", __base__=kinds[0].schema, task=(task, ...))
