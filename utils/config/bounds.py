"""Bounded values for schemas: wide enough for every run, tight enough that nothing overflows."""

from typing import Annotated, Any, TypeVar

from pydantic import Field

T = TypeVar("T")
Some = Annotated[list[T], Field(min_length=1)]
Two = Annotated[list[T], Field(min_length=2, max_length=2)]


def between(kind: type, least: float, most: float) -> Any:
    """Return the type of an int or a float within both bounds."""
    return Annotated[kind, Field(ge=least, le=most)]


Seed = between(int, 0, 2**63 - 1)
Count = between(int, 1, 10**9)  # steps, images, jobs
CountOrZero = between(int, 0, 10**9)
Side = between(int, 1, 16_384)  # pixels
SizeHW = Two[Side]  # of an image
Width = between(int, 1, 65_536)
Pixels = between(int, 1, 10**12)

Name = Annotated[str, Field(min_length=1)]
Fraction = between(float, 0, 1)
Share = between(float, 1e-6, 1)
Inner = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Factor = between(float, 0, 1e6)
Positive = between(float, 1e-30, 1e30)  # representable in float32
Duration = between(float, 1e-6, 1e9)  # in epochs or minutes
DurationOrZero = between(float, 0, 1e9)
Patience = between(float, 1, 1e8)  # in seconds
