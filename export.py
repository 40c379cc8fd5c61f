"""Export weights to files that other tools read; each is compared with PyTorch before it is kept.

    python export.py format=onnx run_dir=RUN                          writes RUN/export/model.onnx
    python export.py format=onnx precision=fp16 run_dir=RUN           or int8, measured on the run's validation split
    python export.py format=timm run_dir=RUN                          or transformers, official, minkowski, safetensors
    python export.py format=timm run_dir=RUN 'weights=[best,last]'    the mean of several
    python export.py format=timm weights=FILE model=convnextv2_tiny augment=randaugment output=FOLDER

docs/weights.md has each format, what it can hold, and how it is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator
from torch import nn

from data.config import AugmentConfig, DataConfig
from engine.config import MachineConfig
from engine.run import start_machine
from engine.tasks.exporting import averaged, measure_loss, open_other, open_own, read_images, without_head
from engine.tasks.foreign import ForeignSource
from engine.tasks.rebuild import rebuild_task
from models.config import ModelConfig
from models.export.model_card import licence_of
from models.export.onnx_file import FILES, OnnxSettings, export_onnx, open_session
from models.export.targets import TARGETS, export_folder
from models.image_model import ImageModel
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict
from utils.io.files import output_errors, write_json
from utils.io.weights import WEIGHT_NAMES, choose_weights
from utils.record.logging import get_logger
from utils.record.run_folder import read_run_config

log = get_logger(__name__)

# The greatest difference from PyTorch that is accepted without `tolerance`; int8 is judged by its accuracy.
_PATIENCE_SEC = 1800.0  # of a rank that hangs
_TOLERANCES = {"fp32": 1e-3, "fp16": 5e-2, "int8": None}


class ExportConfig(Strict):
    """`weights` is best, best_raw, last, ema, a file, or a list of these, of which the mean is exported.

    `output` is a folder (null: export/ in the run folder). precision and dynamic_size are for ONNX; calibration_images,
    batch_size, data, workers and threads for int8; `data` null means the run's own. `licence` replaces what is known of
    the licence of the source weights.
    """

    format: Literal["onnx", "timm", "transformers", "official", "minkowski", "safetensors"]
    run_dir: str | None
    weights: str | Annotated[list[str], Field(min_length=1)]
    init_weights: Literal["model", "ema"]
    output: str | None
    backbone_only: bool
    precision: Literal["fp32", "fp16", "int8"]
    dynamic_size: bool
    calibration_images: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    tolerance: Annotated[float, Field(gt=0)] | None
    licence: str | None
    model: ModelConfig | None
    data: DataConfig | None
    augment: AugmentConfig | None
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)] | None

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
        if self.model is None and (self.augment is not None or "timm" in self.names()):
            raise ValueError("model: must be given with augment and with weights=timm")
        if self.format != "onnx" and (self.precision != "fp32" or self.dynamic_size):
            raise ValueError(f"precision: precision and dynamic_size are for format=onnx, not for {self.format}")
        if self.precision == "int8" and self.run_dir is None:
            raise ValueError("precision: int8 is measured on a run's validation split; add run_dir=RUN")
        if self.precision == "int8" and self.backbone_only:
            raise ValueError("precision: int8 of a backbone is not judged by any accuracy; set backbone_only=false")
        return self


@contextmanager
def open_weights(config: ExportConfig) -> Iterator[tuple[ImageModel, nn.Module, dict[str, Any], Path | None]]:
    """Yield the model, the whole network of the file, its metadata, and the file where it is ours."""
    if config.model is not None:
        source = ForeignSource(config.names()[0], config.model, config.augment, config.init_weights)
        yield *open_other(source), None
        return
    with averaged([choose_weights(config.run_dir or "", name) for name in config.names()]) as path:
        yield *open_own(path), path


def export_to_onnx(
    config: ExportConfig, model: ImageModel, metadata: dict[str, Any], path: Path | None, folder: Path
) -> dict[str, Any]:
    """Write the ONNX file and return its report."""
    tolerance = _TOLERANCES[config.precision] if config.tolerance is None else config.tolerance
    settings = {"precision": config.precision, "dynamic_size": config.dynamic_size, "tolerance": tolerance}
    file = folder / FILES[config.precision]
    if config.precision != "int8":
        difference = export_onnx(model, metadata, file, OnnxSettings(**settings))
        return {"file": file.name, "onnx_max_abs_diff": difference}
    assert path is not None and config.run_dir is not None
    rebuilt, saved = rebuild_task(path), read_run_config(Path(config.run_dir))
    data = rebuilt.kind.open_data(
        config.data or TypeAdapter(DataConfig).validate_python(saved["data"]), rebuilt.setup.model,
        start_machine(config.machine()), seed=saved["seed"], batch_size=config.batch_size, run_path=None,
    )  # fmt: skip
    samples = rebuilt.kind.calibration(data, rebuilt.setup, config.calibration_images)
    calibration = read_images(samples, config.calibration_images)
    difference = export_onnx(model, metadata, file, OnnxSettings(**settings, calibration=calibration))
    loss = measure_loss(model, open_session(file), rebuilt.kind.evaluation(data, rebuilt.setup, training=False)["val"])
    return {"file": file.name, "onnx_max_abs_diff": difference, **loss}


@entry_point("export", ExportConfig)
def main(config: ExportConfig, job: Job) -> str:
    """Export."""
    # ------------------------------------------------------------------------------------------------ 1. The weights
    with open_weights(config) as (model, whole, metadata, path):
        if config.licence is not None:
            metadata = {**metadata, "origin": {**(metadata.get("origin") or {}), "licence": config.licence}}
        if config.backbone_only:
            model, metadata = without_head(model, metadata)
            whole = model.network

        # -------------------------------------------------------------------------------------------- 2. The files
        inside = "export" if config.format == "onnx" else f"export/{config.format}"
        folder = Path(config.run_dir or "") / inside if config.output is None else Path(config.output)
        with output_errors("output", folder):
            if config.format == "onnx":
                report = export_to_onnx(config, model, metadata, path, folder)
            else:
                tolerance = 1e-3 if config.tolerance is None else config.tolerance
                report = export_folder(TARGETS[config.format], model, whole, metadata, folder, tolerance)
            report |= {"step": metadata["step"], "licence": licence_of(metadata)}
            write_json(folder / "export.json", report)
    line = "  ".join(f"{key}={value:.2g}" for key, value in report.items() if isinstance(value, float))
    log.info("wrote %s (licence of the source weights: %s)  %s", folder / report["file"], report["licence"], line)
    return f"{folder / report['file']}  {line}"


if __name__ == "__main__":
    main()
