"""Export a run's weights to files that other tools read; each is compared with PyTorch before it is kept.

python export.py format=onnx run_dir=RUN                    writes RUN/export/model.onnx
python export.py format=onnx run_dir=RUN output=FOLDER weights=last
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from engine.tasks.rebuild import load_image_model
from models.onnx_export import export_model
from utils.config.entry_point import Job, entry_point
from utils.config.schema import Strict
from utils.io.files import output_errors, write_json
from utils.io.weights import choose_weights
from utils.record.logging import get_logger

log = get_logger(__name__)


class ExportConfig(Strict):
    """`weights` is best, last, ema or a file; `output` a folder (null: export/ in the run folder)."""

    format: Literal["onnx"]
    run_dir: str
    weights: str
    output: str | None
    tolerance: Annotated[float, Field(gt=0)]


@entry_point("export", ExportConfig)
def main(config: ExportConfig, job: Job) -> str:
    """Export."""
    model, metadata = load_image_model(choose_weights(config.run_dir, config.weights))
    folder = Path(config.run_dir) / "export" if config.output is None else Path(config.output)
    path = folder / "model.onnx"
    with output_errors("output", folder):
        difference = export_model(model, metadata, path, config.tolerance)
        report = {"file": path.name, "step": metadata["step"], "onnx_max_abs_diff": difference}
        write_json(folder / "export.json", report)
    log.info("wrote %s (greatest difference from PyTorch %.1e)", path, difference)
    return f"{path}  onnx_max_abs_diff={difference:.1e}"


if __name__ == "__main__":
    main()
