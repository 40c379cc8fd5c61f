"""The table of kinds: task name -> Kind.

| name | script | rows | fields | output |
|---|---|---|---|---|
| classification | finetune.py, train.py | labelled images | labels | classes |
| tagging | finetune.py, train.py | images with tags | tags, unknown_tags, flip | tags |
| distillation | finetune.py, train.py | all images, or labelled ones | labels | the teacher's, or features |
| fcmae | pretrain_fcmae.py | all images | mask | features |
| diffusion | finetune_sdxl.py | captioned images | token_ids, is_dropped, strata, tags | none |
| autoencoder | finetune_vae.py | all images | none | none |
"""

from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field

from engine.tasks.autoencoder import AutoencoderKind
from engine.tasks.classification import ClassificationKind
from engine.tasks.diffusion_kind import DiffusionKind
from engine.tasks.distillation import DistillationKind
from engine.tasks.fcmae import FCMAEKind
from engine.tasks.kind import Kind
from engine.tasks.tagging import TaggingKind

KINDS: dict[str, Kind] = {
    "classification": ClassificationKind(),
    "tagging": TaggingKind(),
    "distillation": DistillationKind(),
    "fcmae": FCMAEKind(),
    "diffusion": DiffusionKind(),
    "autoencoder": AutoencoderKind(),
}


def task_schema(script: str) -> Any:
    """Return the schema of `task` in a root script: the union of its kinds' configs, chosen by `name`."""
    configs = tuple(kind.config for kind in KINDS.values() if script in kind.scripts)
    return configs[0] if len(configs) == 1 else Annotated[reduce(or_, configs), Field(discriminator="name")]
