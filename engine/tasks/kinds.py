"""The table of kinds: task name -> Kind. The root scripts look their task up here.

| name | script | rows | fields | output |
|---|---|---|---|---|
| classification | finetune.py, train.py | labelled images | labels | classes |
| fcmae | pretrain_fcmae.py | all images | mask | features |
"""

from typing import Annotated, Any

from pydantic import Field

from engine.tasks.classification import ClassificationKind
from engine.tasks.fcmae import FCMAEKind
from engine.tasks.kind import Kind
from utils.errors import UserError, close_names

KINDS: dict[str, Kind] = {
    "classification": ClassificationKind(),
    "fcmae": FCMAEKind(),
}


def find_kind(name: Any, key: str) -> Kind:
    """Return the kind of a task name. Raises UserError (`key`) where the table has none."""
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"{key}: unknown task {name!r}; {close_names(str(name), KINDS)}")
    return KINDS[name]


def task_schema(script: str) -> Any:
    """Return the schema of `task` in a root script: the configs of its kinds, chosen by `name`."""
    configs = tuple(kind.config for kind in KINDS.values() if script in kind.scripts)
    return configs[0] if len(configs) == 1 else Annotated[configs, Field(discriminator="name")]
