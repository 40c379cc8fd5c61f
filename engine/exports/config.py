"""The keys of export.py and of all commands that read a weight file, and the formats of export.py (formats.yaml)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import model_validator

from utils.config.bounds import Positive
from utils.config.schema import PathText, Strict
from utils.errors import about
from utils.io.files import read_beside
from utils.io.weight_files import WEIGHT_NAMES, choose_weights


class MovedBase(Strict):
    """The present paths of the base model and of a separate VAE, if they have moved since training."""

    path: PathText | None
    vae: PathText | None


class WeightsChoice(Strict):
    """A weight file: `weights` is best, last, ema or a kept step of `run_dir`, or names a file."""

    run_dir: PathText | None
    weights: PathText
    model: MovedBase

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.run_dir is None and self.weights in WEIGHT_NAMES:
            raise ValueError(f"run_dir: must be given for weights={self.weights}; add run_dir=RUN, or weights=FILE")
        return self

    @about("weights")
    def find(self) -> Path:
        """Return the file."""
        return choose_weights(self.run_dir or "", self.weights)


class Format(NamedTuple):
    """All that export.py knows of a format.

    file: the file that names the export. write: `module:function`, which writes and compares the files; it takes
    the weights, an empty folder and the settings (ExportConfig), and returns the report. of: the outputs
    (models/outputs.py) or tasks that the format can have. library: the hub's name of the library that loads it.
    template: the program of the card, in models/interop/snippets. use: the function that writes another program, which
    has the call `load`. Without both, `load` is the call itself, or the format is for Atelier's own commands.
    """

    file: str
    write: str
    of: Sequence[str] = ("classes", "tags", "number", "features")
    library: str | None = None
    template: str | None = None
    use: str | None = None
    load: str = ""
    fp16: bool = False  # takes precision=fp16
    int8: bool = False
    is_adapter: bool = False  # holds a change of the base model, and needs it


_ROWS = read_beside(__file__, "formats.yaml")
FORMATS = {name: Format(**row) for name, row in _ROWS.items()}


class ExportConfig(WeightsChoice):
    """conf/export.yaml, checked."""

    format: Literal[tuple(FORMATS)]
    output: PathText | None
    precision: Literal["fp32", "fp16", "int8"]
    tolerance: Positive | None
    thresholds: PathText | None
    license: str | None
    author: str | None
    description: str | None
    trigger: str | None
    card: PathText | None
    dry_run: bool

    @property
    def accepted(self) -> float:
        """Return the largest accepted difference. Measured, with random and varied weights: at most 1e-6 and 2e-3."""
        return self.tolerance or {"fp16": 2e-2}.get(self.precision, 1e-3)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.output is None and self.run_dir is None:
            raise ValueError("output: must be given without a run_dir; add output=FOLDER")
        if not getattr(FORMATS[self.format], self.precision, True):
            raise ValueError(f"precision: format={self.format} ignores it; remove precision, or set format=onnx")
        return self
