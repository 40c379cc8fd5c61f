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


def check_path(text: str) -> str:
    """Raise ValueError for a text that is no path on any file system: empty, too long, or with a NUL."""
    content = text.encode()
    if not text or "\0" in text or len(content) > _PATH_BYTES or max(map(len, content.split(b"/"))) > _NAME_BYTES:
        raise ValueError(
            f"must be a path of at most {_PATH_BYTES:,} bytes, with names of at most {_NAME_BYTES}, or null where that "
            f"is allowed; found {len(content):,} bytes, {text[:_NAME_BYTES]!r}"
        )
    return text


# A path on the command line is taken as it is written, though Hydra's grammar would refuse or change it.
_IS_PATH = AfterValidator(check_path)
PathText = Annotated[str, _IS_PATH]


def walk_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield a schema's dotted keys, groups and leaves, with their fields; of a union those of all models."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}", field
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from walk_keys(part, f"{prefix}{name}.")


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it is made of; the keys of a dict are free."""
    yield annotation
    if typing.get_origin(annotation) is not dict:
        for part in typing.get_args(annotation):
            yield from _parts(part)


def path_keys(schema: type[BaseModel]) -> set[str]:
    """Return the dotted keys of a schema whose values are paths."""
    return {
        key
        for key, field in walk_keys(schema)
        if any(part is _IS_PATH for part in (*field.metadata, *_parts(field.annotation)))
    }
