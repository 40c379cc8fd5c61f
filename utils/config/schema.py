"""The base of every configuration model: frozen, strict, without unknown keys.

YAML holds the values, these models hold the shape (docs/configuration.md). A room's models are in its `config.py`.
"""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Refuse unknown keys, wrong types (a bool is not an int), NaN and infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
