"""Bounded numbers for schemas: wide enough for every run, tight enough that nothing overflows."""

from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # steps, images, jobs
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Side = Annotated[int, Field(ge=1, le=16_384)]  # pixels
Pair = Annotated[list[Side], Field(min_length=2, max_length=2)]
SizeHW = Pair  # of an image
Width = Annotated[int, Field(ge=1, le=65_536)]
Pixels = Annotated[int, Field(ge=1, le=10**12)]

Name = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=1e-6, le=1)]
Inner = Annotated[float, Field(gt=0, lt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]  # representable in float32
Duration = Annotated[float, Field(ge=1e-6, le=1e9)]  # in epochs or minutes
DurationOrZero = Annotated[float, Field(ge=0, le=1e9)]
Patience = Annotated[float, Field(ge=1, le=1e8)]  # in seconds
