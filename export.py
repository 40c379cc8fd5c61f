"""Export weights to files that other tools read; each is compared with PyTorch before it is kept.

    python export.py format=onnx run_dir=RUN                          writes RUN/export/model.onnx
    python export.py format=onnx precision=fp16 run_dir=RUN           or int8, measured on the run's validation split
    python export.py format=timm run_dir=RUN                          or transformers, safetensors, pth
    python export.py format=wd14 run_dir=RUN                          of a tagger; or imgutils, cl_tagger
    python export.py format=timm run_dir=RUN 'weights=[best,last]'    the mean of several
    python export.py format=timm weights=FILE model=convnextv2_tiny augment=randaugment output=FOLDER

docs/weights.md has each format, what it can hold, and how it is loaded.
"""

import utils.config.help  # noqa: F401, I001 (answers --help before the slow imports)

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from data.config import AugmentConfig, DataConfig
from data.image_data import ImageData
from engine.config import MachineConfig
from engine.run import start_machine
from engine.tasks.exporting import averaged, find_export, of_one_size, open_other, open_own, without_head
from engine.tasks.foreign import ForeignSource, check_average
from engine.tasks.kind import ExportSettings, Opened, Rebuilt
from engine.tasks.kinds import export_formats, options_of
from engine.tasks.rebuild import read_run_data
from models.config import ModelConfig
from models.export.model_card import licence_entry
from models.export.report import add_report, refuse_other_format
from utils.config.bounds import BatchSize, Count, Positive, Processes, Workers
from utils.config.entry_point import Job, entry_point
from utils.config.schema import PathText, Strict
from utils.errors import close_names
from utils.io.files import output_errors
from utils.io.weights import WEIGHT_NAMES, choose_weights
from utils.record.logging import get_logger
from utils.record.wandb_export import send_export
from utils.thresholds import FILE as THRESHOLDS
from utils.thresholds import ThresholdTable, read_thresholds
from utils.vocabulary import vocabulary_of

log = get_logger(__name__)

_PATIENCE_SEC = 1800.0  # of a rank that hangs


def check_format(name: str) -> str:
    """Raise ValueError for a format that no kind has."""
    if name not in (formats := export_formats()):
        raise ValueError(f"unknown format {name!r}; {close_names(name, formats)}")
    return name


class ExportConfig(Strict):
    """`weights` is best, best_raw, last, ema, a file, or a list of these, of which the mean is exported.

    `output` is a folder (null: export/ in the run folder, export/FORMAT/ for others than onnx). precision and
    dynamic_size are for ONNX; calibration_images, batch_size, data, workers and threads for int8; `data` null means the
    run's own. `licence` replaces what is known of the licence of the source weights.
    """

    format: Annotated[str, AfterValidator(check_format)]
    run_dir: PathText | None
    weights: PathText | Annotated[list[PathText], Field(min_length=1)]
    init_weights: Literal["model", "ema"]
    output: PathText | None
    backbone_only: bool
    precision: Literal["fp32", "fp16", "int8"]
    dynamic_size: bool
    calibration_images: Count
    batch_size: BatchSize
    tolerance: Positive | None
    thresholds: PathText | None
    licence: str | None
    model: ModelConfig | None
    data: DataConfig | None
    augment: AugmentConfig | None
    dry_run: bool
    workers: Literal["auto"] | Workers
    threads: Processes | None

    def names(self) -> list[str]:
        """Return the weights as a list."""
        return [self.weights] if isinstance(self.weights, str) else self.weights

    def machine(self) -> MachineConfig:
        """Return the machine that int8 is calibrated and measured on."""
        return MachineConfig(
            device="cpu", precision="fp32", channels_last=False, workers=self.workers, threads=self.threads,
            deterministic=False, hang_timeout_sec=_PATIENCE_SEC,
        )  # fmt: skip

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.run_dir is None and set(self.names()) & set(WEIGHT_NAMES):
            raise ValueError(f"run_dir: must be given for weights={self.weights}; add run_dir=RUN, or weights=FILE")
        if self.run_dir is None and self.output is None:
            raise ValueError("output: must be given where there is no run_dir; add output=FOLDER")
        if self.model is not None and (self.run_dir is not None or len(self.names()) > 1):
            raise ValueError(
                "model: is for one weight file that is not ours; remove model, or run_dir and other weights"
            )
        check_average(self.init_weights, self.model)
        if self.model is None and (self.augment is not None or "timm" in self.names()):
            raise ValueError("model: must be given with augment and with weights=timm")
        for key, default in (("precision", "fp32"), ("dynamic_size", False)):
            if getattr(self, key) != default and key not in options_of(self.format):
                raise ValueError(f"{key}: format={self.format} does not read it; remove {key}, or set format=onnx")
        if self.precision == "int8" and self.run_dir is None:
            raise ValueError("precision: int8 is measured on a run's validation split; add run_dir=RUN")
        return self


@contextmanager
def open_weights(config: ExportConfig) -> Iterator[Opened]:
    """Yield what is exported."""
    if config.model is not None:
        yield open_other(ForeignSource(config.names()[0], config.model, config.augment, config.init_weights))
        return
    with averaged([choose_weights(config.run_dir or "", name) for name in config.names()]) as path:
        yield open_own(path)


def settings_of(config: ExportConfig, opened: Opened) -> ExportSettings:
    """Return how the files are written."""

    def open_data(rebuilt: Rebuilt) -> ImageData:
        saved = read_run_data(Path(config.run_dir))
        runtime = start_machine(config.machine())
        return rebuilt.kind.pipeline.open(
            config.data or saved.data, rebuilt.setup, runtime, seed=saved.seed, batch_size=config.batch_size
        )

    return ExportSettings(
        config.precision, config.dynamic_size, config.tolerance, config.calibration_images, open_data,
        thresholds=find_thresholds(config, opened),
    )  # fmt: skip


def find_thresholds(config: ExportConfig, opened: Opened) -> ThresholdTable | None:
    """Return a tagger's thresholds: those named, or those that evaluate.py has written into the run folder."""
    own = None if config.run_dir is None else Path(config.run_dir) / THRESHOLDS
    path = own if config.thresholds is None else Path(config.thresholds)
    if opened.metadata.get("output") != "tags" or path is None or (config.thresholds is None and not path.exists()):
        return None
    log.info("thresholds: %s", path)
    return read_thresholds(path, vocabulary_of(opened.metadata), "thresholds")


@entry_point("export", ExportConfig)
def main(config: ExportConfig, job: Job) -> str:
    """Export."""
    started = time.time()
    # ------------------------------------------------------------------------------------------------ 1. The weights
    with open_weights(config) as opened:
        opened = opened.with_licence(config.licence)
        if config.backbone_only:
            opened = without_head(opened)
        opened = of_one_size(opened)

        # -------------------------------------------------------------------------------------------- 2. The files
        export, settings = find_export(config.format, opened), settings_of(config, opened)
        inside = "export" if config.format == "onnx" else f"export/{config.format}"
        folder = Path(config.run_dir or "") / inside if config.output is None else Path(config.output)
        with output_errors("output", folder):
            refuse_other_format(folder, export.file(settings), config.format)
            if config.dry_run:
                return "dry run: nothing is written"
            report = export.write(opened, folder, settings)
            report |= {"format": config.format, "step": opened.metadata["step"]}
            report |= licence_entry("licence", opened.metadata)
            add_report(folder, report)
    if config.run_dir is not None:
        files = [file for file in folder.iterdir() if file.is_file() and file.stat().st_mtime >= started]
        send_export(Path(config.run_dir), config.format, files, report, weights=config.names())
    line = "  ".join(f"{key}={value:.2g}" for key, value in report.items() if isinstance(value, float))
    licence = f" (licence of the source weights: {report['licence']})" if "licence" in report else ""
    log.info("wrote %s%s  %s", folder / report["file"], licence, line)
    return f"{folder / report['file']}  {line}"


if __name__ == "__main__":
    main()
