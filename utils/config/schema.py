"""The base of every configuration model: frozen, strict, without unknown keys; and the keys that a model has.

YAML holds the values, these models hold the shape (docs/configuration.md). A room's models are in its `config.py`.
"""

import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

_NAME_BYTES, _PATH_BYTES = 255, 4095


class Strict(BaseModel):
    """Refuse unknown keys, wrong types (a bool is not an int), NaN and infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _PathMark:
    """Mark the text of a path."""


def check_path(text: str) -> str:
    """Raise ValueError for a text that is no path on any file system: empty, too long, or with a NUL."""
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path; give a file or folder, or null where the key may be without one")
    content = text.encode()
    longest = max(map(len, content.split(b"/")))
    if longest > _NAME_BYTES or len(content) > _PATH_BYTES:
        raise ValueError(
            f"a path of {len(content):,} bytes, the longest name in it {longest:,}, is too long; file systems take "
            f"{_NAME_BYTES} bytes in a name and {_PATH_BYTES:,} in all"
        )
    return text


# A path on the command line is taken as it is written, though Hydra's grammar would refuse or change it.
PathText = Annotated[str, _PathMark(), AfterValidator(check_path)]


def walk_keys(schema: type[BaseModel], values: Any = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo | None]]:
    """Yield a schema's dotted keys, groups and leaves, with their fields; None for the keys of a free group.

    Of a union all models' keys, or those that `values` choose; of a free group those that `values` has.
    """
    for name, field in schema.model_fields.items():
        key, inner = f"{prefix}{name}", values.get(name) if isinstance(values, dict) else None
        yield key, field
        for model in _models(field.annotation, inner):
            yield from walk_keys(model, inner, f"{key}.")
        if is_free_group(field) and isinstance(inner, dict):
            for own, value in inner.items():
                yield f"{key}.{own}", None
                for model in _models(typing.get_args(field.annotation)[1], value):
                    yield from walk_keys(model, value, f"{key}.{own}.")


def known_keys(schema: type[BaseModel], values: Any = None) -> list[str]:
    """Return a schema's dotted keys, as `walk_keys` finds them, each once."""
    return list(dict.fromkeys(key for key, _ in walk_keys(schema, values)))


def path_keys(schema: type[BaseModel]) -> set[str]:
    """Return the dotted keys of a schema whose values are paths."""
    return {key for key, field in walk_keys(schema) if field is not None and _is_path(field.annotation, field.metadata)}


def is_free_group(field: FieldInfo | None) -> bool:
    """Return whether a group's own keys are free, such as those of optim.extra."""
    return field is not None and typing.get_origin(field.annotation) is dict


def _is_path(annotation: Any, metadata: typing.Iterable[Any] = ()) -> bool:
    """Return whether an annotation, or a part of it, is marked as a path."""
    marked = any(isinstance(mark, _PathMark) for mark in metadata)
    return marked or any(isinstance(part, _PathMark) or _is_path(part) for part in typing.get_args(annotation))


def _models(annotation: Any, values: Any = None) -> list[type[BaseModel]]:
    """Return the models that an annotation admits; of a union those whose tag is in `values`, if any is."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    options = () if typing.get_origin(annotation) is dict else typing.get_args(annotation)
    found = [model for option in options for model in _models(option)]
    texts = {value for value in values.values() if isinstance(value, str)} if isinstance(values, dict) else set()
    return [model for model in found if texts & _tags(model)] or found


def _tags(model: type[BaseModel]) -> set[str]:
    """Return the texts by which unions tell a model from the others: those of its single-valued literals."""
    choices = [typing.get_args(field.annotation) for field in model.model_fields.values()]
    return {values[0] for values in choices if len(values) == 1 and isinstance(values[0], str)}
