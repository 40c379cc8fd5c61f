"""The reports of the jobs of prepare.py, and what a job refuses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.layouts.table import is_packed
from utils.errors import UserError
from utils.io.files import output_errors, write_json, write_text
from utils.record.logging import log
from utils.record.report import PAGE, TableRow, write_html, write_report

_NAMED = 10  # files in the log


def refuse_shards(root: str | Path, table: pa.Table) -> None:
    """Raise UserError (`data.root`) for images in shards, for a job that needs a file of each."""
    if is_packed(table):
        raise UserError(
            f"data.root: '{root}' has its images in shards, and this job reads files; run it on the folder that "
            "was packed, and pack the result"
        )


def list_files(report: str, job: str, reasons: Mapping[str, str], shown: int = _NAMED) -> Path:
    """Write one JSON line {"path", "reason"} per file; log the first `shown` ones, at most _NAMED."""
    for path, reason in list(reasons.items())[: min(shown, _NAMED)]:
        log.info("%s: %s", path, reason)
    file = Path(report) / f"{job}.jsonl"
    lines = [json.dumps({"path": path, "reason": reason}, ensure_ascii=False) for path, reason in reasons.items()]
    with output_errors("job.report", file):
        write_text(file, "".join(line + "\n" for line in lines))
    return file


def save_report(
    folder: Path,
    title: str,
    figures: Mapping[str, float],
    tables: Mapping[str, Sequence[TableRow]],
    images: Mapping[str, np.ndarray],
) -> Path:
    """Write figures, tables and images [H, W, 3] as an HTML page (its path is returned), JSON, CSV and PNG files."""
    with output_errors("job.report", folder):
        write_report(folder, tables, images)
        write_json(folder / f"{folder.name}.json", {"figures": figures, "tables": tables})
        write_html(folder / PAGE, f"{folder.name}: {title}", figures, tables, images)
    return folder / PAGE
