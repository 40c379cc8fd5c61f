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


def walk_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield a schema's dotted keys, groups and leaves, with their fields; of a union those of all models."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}", field
        for model in _models(field.annotation):
            yield from walk_keys(model, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation admits; the keys of a dict are free."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    options = () if typing.get_origin(annotation) is dict else typing.get_args(annotation)
    return [model for option in options for model in _models(option)]


def path_keys(schema: type[BaseModel]) -> set[str]:
    """Return the dotted keys of a schema whose values are paths."""
    return {key for key, field in walk_keys(schema) if _is_path(field.annotation, field.metadata)}


def _is_path(annotation: Any, metadata: typing.Iterable[Any] = ()) -> bool:
    """Return whether an annotation, or a part of it, is marked as a path."""
    marked = any(isinstance(mark, _PathMark) for mark in metadata)
    return marked or any(isinstance(part, _PathMark) or _is_path(part) for part in typing.get_args(annotation))
