"""A page of an evaluation's figures, pictures and tables, in one file that needs neither a server nor other files.

Names in it come from files of strangers: all text is escaped, and the page allows no script and loads nothing.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.io.files import write_text
from utils.record.figures import show_name
from utils.record.report_files import TableRow
from utils.text_table import show_cell

FILE = "report.html"
_ROWS = 30  # of a table
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #212529; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
nav a {{ margin-right: 1rem }} img {{ max-width: 100% }} div {{ overflow-x: auto }} p {{ color: #666 }}
table {{ border-collapse: collapse }} th, td {{ padding: .15rem .7rem; border-bottom: 1px solid #ddd }}
th, td {{ text-align: left }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums }}
</style><title>{title}</title></head><body><h1>{title}</h1>
"""


def write_page(
    path: Path,
    title: str,
    scalars: Mapping[str, float],
    tables: Mapping[str, Sequence[TableRow]],
    images: Mapping[str, np.ndarray],
) -> None:
    """Write the figures, the images [H, W, 3] uint8, and the first rows of each table that has any. Raises OSError."""
    figures = [{"figure": show_name(name), "value": value} for name, value in scalars.items()]
    parts = {"figures": _table(figures, len(figures))}
    parts |= {show_name(name): _picture(name, image) for name, image in images.items()}
    parts |= {show_name(name): _table(rows, _ROWS) for name, rows in tables.items() if rows}
    links = "".join(f'<a href="#p{place}">{html.escape(name)}</a>' for place, name in enumerate(parts))
    sections = "".join(
        f'<h2 id="p{place}">{html.escape(name)}</h2>\n{part}\n' for place, (name, part) in enumerate(parts.items())
    )
    write_text(path, f"{_HEAD.format(title=html.escape(title))}<nav>{links}</nav>\n{sections}</body></html>\n")


def _table(rows: Sequence[TableRow], most: int) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = "\n".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>" for row in rows[:most])
    more = f"<p>The first {most} of {len(rows):,} rows; all are in tables/.</p>" if len(rows) > most else ""
    return f"<div><table><tr>{head}</tr>\n{lines}</table></div>{more}"


def _cell(value: object) -> str:
    kind = ' class="n"' if isinstance(value, int | float) else ""
    return f"<td{kind}>{html.escape(show_cell(value))}</td>"


def _picture(name: str, image: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(show_name(name))}" src="data:image/png;base64,{encoded}">'
