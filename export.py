"""Export weights to files for other tools. Each file is compared with PyTorch before it is kept.

    python export.py format=onnx run_dir=RUN                          writes RUN/export/model.onnx
    python export.py format=onnx precision=fp16 run_dir=RUN           RUN/export/model_fp16.onnx
    python export.py format=onnx precision=int8 run_dir=RUN           RUN/export/model_int8.onnx, if it pays
    python export.py format=timm run_dir=RUN                          or transformers, safetensors
    python export.py format=page run_dir=RUN                          one HTML file that predicts in a browser
    python export.py format=wd14 run_dir=RUN                          for a tagger
    python export.py format=wd_repository run_dir=RUN                 a tagger for all programs, to publish
    python export.py format=timm run_dir=RUN hub=OWNER/NAME           uploads them, private, as one commit
    python export.py format=kohya run_dir=RUN                         for SDXL; or single_file, diffusers, ...
    python export.py format=kohya weights=A lora=[B:0.5] output=FOLDER        two LoRAs of anybody in one (docs/lora.md)
    python export.py format=kohya weights=A rank=8 output=FOLDER               a smaller one
    python export.py format=kohya weights=TUNED model.path=BASE rank=32 output=FOLDER      one of two checkpoints

docs/weights.md describes the formats, how to load them, and how weights from elsewhere become a run.
"""

from utils.start import begin

begin(__doc__)

from pathlib import Path

from engine.exports.card import REPORT, add_report
from engine.exports.formats import ExportConfig, find_format, write_export
from engine.exports.weights import open_weights
from models.interop.metadata import licence_entry, refuse_licence
from sdxl.lora.combined import write_combined
from utils.config.entry_point import Job, entry_point
from utils.errors import about
from utils.io.files import refuse_links_out
from utils.io.hub import upload
from utils.io.journal import open_journal
from utils.io.safe_text import Lines
from utils.record.logging import get_logger

log = get_logger(__name__)


@entry_point("export", ExportConfig)
def main(config: ExportConfig, job: Job) -> str:
    """Export."""
    # ------------------------------------------------------------------------------------------------ 1. The weights
    if config.lora or config.rank:
        return write_combined(config)
    with about("weights"):
        weights = open_weights(config.find(), base=config.model).for_export(config.license)
    find_format(config.format, weights)
    if config.hub.name is not None:
        refuse_licence(weights.metadata)
    if config.dry_run:
        return "dry run: nothing is written"

    # -------------------------------------------------------------------------------------------------- 2. The files
    inside = "export" if config.format == "onnx" else f"export/{config.format}"
    folder = Path(config.run_dir or "") / inside if config.output is None else Path(config.output)
    inside_run = (Path(config.run_dir), Path(config.run_dir, "export")) if config.output is None else ()
    for place in (*inside_run, folder):
        refuse_links_out("output", place)
    with open_journal("output", folder, is_folder=True):
        report = write_export(weights, folder, config)
        report |= {"format": config.format, "step": weights.metadata["step"], **licence_entry(weights.metadata)}
        add_report(folder, report)
    line = "  ".join(f"{key}={value:.2g}" for key, value in report.items() if isinstance(value, float))
    licence = f" (licence of the source weights: {report['license']})" if "license" in report else ""
    wrote = f"wrote {folder / report['file']}{licence}  {line}"

    # ---------------------------------------------------------------------------------------------------- 3. The hub
    if config.hub.name is None:
        return wrote
    files = {name: folder / name for name in (*report["files"], REPORT)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    shown = "".join(f"\n  {name}  {size:,} bytes" for name, size in sizes.items())
    log.info("hub: %s, %d files, %s bytes%s", config.hub.name, len(files), f"{sum(sizes.values()):,}", Lines(shown))
    if config.hub.dry_run:
        return f"{wrote}; hub.dry_run: nothing is uploaded"
    return f"{wrote}; {config.hub.name} has commit {upload(files, config.hub.name, private=config.hub.private)}"


if __name__ == "__main__":
    main()
