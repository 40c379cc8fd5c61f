"""Write an evaluation's report into a run folder: tables/NAME.csv, plots/NAME.png and report.html.

The page is self-contained. Its names are untrusted: all text is escaped, and the page allows no script and loads
nothing.
"""

import base64
import csv
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.contracts import Figures
from utils.io.files import write_atomically, write_text
from utils.io.safe_text import hide_secrets, safe_row
from utils.record.figures import show_name, show_rows

PAGE = "report.html"
STEPS = "plots/steps"
TableRow = Mapping[str, Any]
_SHOWN_ROWS = 30  # of a table on the page
_KEPT_STEPS = 24  # with pictures
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #212529; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } pre { overflow-x: auto } img { max-width: 100% }
"""


def write_table(path: Path, rows: Sequence[TableRow]) -> None:
    """Write rows as CSV, atomically. The table has every column that occurs in a row; None is an empty cell.

    Without rows, the file of an earlier evaluation is removed.
    """
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    # The newest row gives the order of the columns: earlier rows may lack some.
    columns = list(dict.fromkeys(name for row in reversed(rows) for name in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_report(
    folder: Path, tables: Mapping[str, Sequence[TableRow]], images: Mapping[str, np.ndarray], prefix: str = ""
) -> None:
    """Write a report's tables, and its images, which are [H, W, 3] uint8. On rank 0 only. Raises OSError."""
    for name, rows in tables.items():
        write_table(folder / f"tables/{prefix}{name}.csv", [*map(safe_row, rows)])
    for name, image in images.items():
        write_atomically(folder / f"plots/{prefix}{name}.png", partial(Image.fromarray(image).save, format="PNG"))


def keep_pictures(folder: Path, step: int, names: Iterable[str]) -> None:
    """Copy plots/NAME.png into plots/steps/STEP/. Of many steps, every second is removed. Raises OSError."""
    for name in names:
        target = folder / STEPS / f"{step:08}/{name.removesuffix('_before')}.png"
        write_atomically(target, partial(shutil.copyfile, folder / f"plots/{name}.png"), flush=False)
    steps = sorted((folder / STEPS).glob("[0-9]*"))
    for path in steps[1::2] if len(steps) > _KEPT_STEPS else ():
        shutil.rmtree(path)


def write_html(
    path: Path,
    title: str,
    scalars: Figures,
    tables: Mapping[str, Sequence[TableRow]],
    images: Mapping[str, np.ndarray],
) -> None:
    """Write report.html: figures, images [H, W, 3] uint8, and the first rows of each table. Raises OSError."""
    title = escape(hide_secrets(title))
    figures = [{"figure": show_name(name), "value": value} for name, value in scalars.items()]
    parts = {"figures": escape(show_rows(figures))}
    parts |= {name: _picture(name, image) for name, image in images.items()}
    parts |= {name: escape(show_rows(rows[:_SHOWN_ROWS])) for name, rows in tables.items() if rows}
    sections = "".join(f"<h2>{escape(show_name(name))}</h2><pre>{part}</pre>\n" for name, part in parts.items())
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{_STYLE}</style><title>{title}</title></head>
<body><h1>{title}</h1><p>The first {_SHOWN_ROWS} rows of each table; tables/ has all.</p>
{sections}</body></html>
""",
    )


def _picture(name: str, image: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="{escape(show_name(name))}" src="data:image/png;base64,{encoded}">'
