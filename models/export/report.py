"""export.json: one entry for each file that was exported into a folder, under the file's name."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.io.files import read_json, write_json

NAME = "export.json"


def refuse_other_format(folder: Path, file: str, form: str) -> None:
    """Raise UserError (`output`) where a folder has a file of this name in another format."""
    earlier = _read(folder).get(file, {}).get("format", form)
    if earlier != form:
        raise UserError(
            f"output: format={form} would replace the {file} of format={earlier} in {folder}; name another folder"
        )


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of `report["file"]` into export.json; those of other files stay."""
    write_json(folder / NAME, {**_read(folder), report["file"]: report})


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the reports in a folder by file."""
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(report, dict) for report in found.values()):
        raise UserError(f"output: {path} is not a report of export.py; move it away, or name another folder")
    return found
