"""The base of all configuration models, and a walk over their keys.

YAML holds the values, the models hold the types and limits (docs/configuration.md). A room's models are in its
`config.py`.
"""

import os
import typing
from collections.abc import Iterator, Mapping
from functools import cache, reduce
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.fields import FieldInfo

from utils.io.names import find_path


class Strict(BaseModel):
    """Refuse unknown keys, wrong types (a bool is not an int), NaN and infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a checked copy with other values. changes: by key, dotted as on the command line."""
        values = self.model_dump()
        for key, value in changes.items():
            *groups, name = key.split(".")
            reduce(dict.__getitem__, groups, values)[name] = value
        return type(self).model_validate(values)


# On the command line, paths are quoted: Hydra's grammar would refuse or change some of them.
_IS_PATH = "path"
_IS_SHORT = Field(min_length=1, max_length=4095, pattern=r"^([^/\x00]{0,255}(/|$))+$")
PathText = Annotated[  # as the file system spells it
    str, _IS_SHORT, AfterValidator(os.path.expanduser), AfterValidator(find_path), _IS_PATH
]
_IS_TERMS = "terms"
TermsText = Annotated[str, _IS_TERMS]  # what data/collection/search.py finds; quoted, too, because of its = < and "


def _as_list(value: Any) -> Any:
    """Return a single path as a list: the command line parses `[PATH]` without a comma as text."""
    return [value.removeprefix("[").removesuffix("]")] if isinstance(value, str) else value


PathList = Annotated[list[PathText], BeforeValidator(_as_list)]


def text_or(other: Any, text: Any = str) -> Any:
    """Return the type of a text, or of another value; a wrong value is refused as one of them."""
    kinds = Annotated[text, Tag("text")] | Annotated[other, Tag("other")]
    return Annotated[kinds, Discriminator(lambda value: "text" if isinstance(value, str) else "other")]


def walk_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) for all groups and leaves of a schema, including every model of a union."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}", field
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from walk_keys(part, f"{prefix}{name}.")


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all its parts, except below a dict, whose keys are free."""
    yield annotation
    if typing.get_origin(annotation) is not dict:
        for part in typing.get_args(annotation):
            yield from _parts(part)


@cache
def list_keys(schema: type[BaseModel]) -> dict[str, bool]:
    """Return the dotted keys, and whether a value is quoted on the command line, as paths and terms are."""
    keys = {}
    for key, field in walk_keys(schema):
        parts = [*field.metadata, *_parts(field.annotation)]
        keys[key] = _IS_PATH in parts or _IS_TERMS in parts or keys.get(key, False)
    return keys
