"""A format of export.py: one row of the table in engine/exports/formats.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from engine.exports.weights import Weights
from models.outputs import OUTPUTS
from utils.io.files import Json

# From the weights, an empty folder and the settings (ExportConfig) to the report. It writes and compares the files.
Write = Callable[[Weights, Path, Any], Json]


class Format(NamedTuple):
    """All that export.py knows of a format.

    file: the file that names the export. of: what it holds, outputs of models/outputs.py or tasks without one.
    library: the hub's name of the library that loads it. template: the program of the card, in
    models/interop/snippets; null: the format is for Atelier's own commands, or `load` says how to use it. load: of
    SDXL, the call that loads it.
    """

    file: str
    write: Write
    of: tuple[str, ...] = tuple(OUTPUTS)
    library: str | None = None
    template: str | None = None
    load: str = ""
    fp16: bool = False  # takes precision=fp16
    int8: bool = False
    is_adapter: bool = False  # holds a change of the base model, and needs it
