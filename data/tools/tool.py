"""The base class of the jobs of prepare.py: configuration keys and a method that processes a collection.

    class Pack(Tool):
        name: Literal["pack"]      # conf/job/pack.yaml
        output: PathText
        def run(self, data): ...

A tool reads files and writes new ones. It never moves, changes or deletes an image.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.config import DataConfig
from data.layouts.table import PLACES
from data.layouts.walk import check_root
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_json, write_text
from utils.record.logging import get_logger
from utils.record.report import PAGE, TableRow, write_page, write_report

log = get_logger(__name__)

_NAMED = 10  # files in the log


class Tool(Strict):
    """A job of prepare.py."""

    def check(self, data: DataConfig) -> str:
        """Check the settings without doing anything (`dry_run`); return a line for the log."""
        check_root(data.root)
        return "dry run: nothing is written"

    def run(self, data: DataConfig) -> str:
        """Run the job; return a line for the log. Raises UserError."""
        raise NotImplementedError


def refuse_shards(root: str | Path, table: pa.Table) -> None:
    """Raise UserError (`data.root`) for images in shards, for a job that needs a file of each."""
    if PLACES.keys() <= set(table.column_names):
        raise UserError(
            f"data.root: {str(root)!r} has its images in shards, and this job reads files; run it on the folder that "
            "was packed, and pack the result"
        )


def list_files(report: str, job: str, reasons: Mapping[str, str]) -> Path:
    """Write one JSON line {"path", "reason"} per file; log the first ones."""
    for path, reason in list(reasons.items())[:_NAMED]:
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
        write_page(folder / PAGE, f"{folder.name}: {title}", figures, tables, images)
    return folder / PAGE
