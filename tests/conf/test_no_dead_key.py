"""Every model of a schema refuses unknown keys and values of another type; there are few keys.

That the program reads every leaf: tests/conf/slow_dead_key.py. How a refusal names its key: tests/utils/config/.
"""

import re
import typing

import pytest
from pydantic import BaseModel

from tests.in_process import SCRIPTS, load_command
from utils.config.schema import Strict


def list_models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}.union(*[list_models(field.annotation) for field in annotation.model_fields.values()])
    return set().union(*map(list_models, typing.get_args(annotation)))


def list_parts(annotation, within=()):
    """Yield an annotation and its parts, but not those of the types `within`."""
    yield annotation
    if typing.get_origin(annotation) not in within:
        for part in typing.get_args(annotation):
            yield from list_parts(part, within)


MOST_KEYS = 345  # of all scripts; whoever adds a key takes another out


def list_leaves(schema, prefix=""):
    """Yield (key, field) of a schema, such as task[tagging].loss.gamma; groups in a list or a table are one key."""
    for name, field in schema.model_fields.items():
        parts = list(list_parts(field.annotation, within=(list, dict, tuple)))
        groups = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        groups = [part for part in groups if not part.__module__.startswith("tests.")]  # of kinds that tests add
        yield from [] if groups else [(prefix + name, field)]
        for group in groups:
            chosen = [group.model_fields[key].annotation for key in ("family", "name") if key in group.model_fields]
            kinds = [f"[{names[0]}]" for names in map(typing.get_args, chosen) if len(names) == 1]
            yield from list_leaves(group, f"{prefix}{name}{''.join(kinds[:1])}.")


def plain(key):
    """Return a key as it is typed."""
    return re.sub(r"\[.*?\]", "", key)


def test_all_scripts_have_few_keys():
    assert len({plain(key) for script in SCRIPTS for key, _ in list_leaves(load_command(script).schema)}) <= MOST_KEYS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_model_refuses_unknown_keys_and_every_leaf_has_a_type(script):
    for model in list_models(load_command(script).schema):
        assert issubclass(model, Strict) and model.model_config == Strict.model_config, model
        for name, field in model.model_fields.items():
            assert all(part is not typing.Any and part is not object for part in list_parts(field.annotation)), name
