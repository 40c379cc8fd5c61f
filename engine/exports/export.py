"""The main function of export.py."""

from dataclasses import replace
from pathlib import Path

from engine.exports.card import add_report
from engine.exports.config import ExportConfig
from engine.exports.formats import find_format, write_export
from engine.exports.opened_task import open_task
from models.interop.metadata import dict_of, licence_entry
from utils.config.entry_point import Job
from utils.errors import about
from utils.io.files import refuse_links_out
from utils.io.journal import open_journal


def export(config: ExportConfig, job: Job) -> str:
    """Write and compare the files of a format; return the line of the result."""
    # ------------------------------------------------------------------------------------------------ 1. The weights
    with about("weights"):
        weights = open_task(config.find(), base=config.model)
    if config.license is not None:
        origin = {**dict_of(weights.metadata, "origin"), "license": config.license}
        weights = replace(weights, metadata={**weights.metadata, "origin": origin})
    find_format(config.format, weights)
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
    return f"wrote {folder / report['file']}{licence}  {line}"
