"""Parts of a run's page that show its evaluation: tables, thresholds, mistakes and their images."""

import asyncio
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
from fastapi import HTTPException
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record import tables
from utils.record.figures import show_name
from viewer.curves import draw_line, plot, redraw, to_points
from viewer.images import Shelf, find_rows, image_address
from viewer.parts import ACCENT, COLOURS, GREY, TEXT, filtered_table, make_columns, show_command, show_grid
from viewer.review import find_review

_CLASSES = 40  # in a matrix
_IMAGES = 48  # shown at once
_TAGS = 4  # under an image
_TILE = """<div><img v-if="props.row.src" :src="props.row.src" :alt="props.row.texts[0]" loading="lazy">
<div v-for="text in props.row.texts.slice(1)">{{ text }}</div></div>"""
_MATRIX = {
    "grid": {"left": 8, "right": 16, "top": 8, "bottom": 8, "containLabel": True},
    "tooltip": {"confine": True, "renderMode": "richText"},
}


async def show_tables(path: Path) -> None:
    """Show a run's tables."""
    files = await asyncio.to_thread(tables.find_tables, path)
    if not files:
        ui.label("No tables yet: evaluations write them.").classes("muted")
        return

    async def fill(table: ui.table, name: str) -> None:
        names, rows = await asyncio.to_thread(tables.read_csv, files[name])
        table.columns = make_columns({name: escape_controls(show_name(name)) for name in names})
        table.rows = [{**dict(zip(names, map(tables.to_cell, row))), "": place} for place, row in enumerate(rows)]

    await filtered_table([*files], "table", "", fill)


async def show_thresholds(path: Path) -> None:
    """Show precision, recall and F1 at a threshold that the user moves, and the curves that they lie on."""
    groups = await asyncio.to_thread(tables.read_decisions, path)
    if not groups:
        ui.label("No counts by threshold yet: evaluations of classifiers and taggers write them.").classes("muted")
        return
    with ui.row():
        chosen = ui.select({name: escape_controls(name) for name in groups}, value=next(iter(groups)))
        chosen.props("aria-label=group")
        level = ui.slider(min=0, max=0.99, step=0.01, value=0.5).props("aria-label=threshold")
        level.classes("col").style("min-width: 200px")
    said = ui.label().classes("text-weight-medium").style("min-height: 3em")
    with ui.element("div").classes("w-full charts"):
        charts = [ui.echart({}).classes("chart") for _ in range(2)]

    def draw() -> None:
        text, options = draw_decisions(groups[chosen.value], level.value)
        said.set_text(text)
        for chart, its in zip(charts, options):
            redraw(chart, its)

    chosen.on_value_change(draw)
    level.on_value_change(draw)
    draw()


def draw_decisions(decisions: np.ndarray, threshold: float) -> tuple[str, list[Json]]:
    """Return precision, recall and F1 at a threshold as text, and the options of charts: of both, and reliability."""
    thresholds, predicted, correct, precision, recall, f1 = decisions
    row = int(np.abs(thresholds - threshold).argmin())
    text = f"Threshold {threshold:.2f}: precision {precision[row]:.3f}, recall {recall[row]:.3f}, F1 {f1[row]:.3f}; "
    text += f"{correct[row]:,.0f} of {predicted[row]:,.0f} decisions are correct"

    def line(name: str, colour: str, across: np.ndarray, values: np.ndarray) -> Json:
        return draw_line(name, colour, to_points(across, values))

    ends = np.array([0.0, 1.0])
    precision = np.where(predicted > 0, precision, np.nan)
    rates = zip(("precision", "recall", "F1"), COLOURS, (precision, recall, f1))
    by_threshold = [line(name, colour, thresholds, rate) for name, colour, rate in rates]
    by_threshold.append(line("chosen", GREY, np.full(2, threshold), ends))
    reliability = line("share correct", ACCENT, *tables.reliability(decisions))
    charts = {
        "threshold": by_threshold,
        "probability": [reliability, line("ideal", GREY, ends, ends)],
    }
    return text, [plot(lines, {"name": name, "min": 0, "max": 1}) for name, lines in charts.items()]


async def show_mistakes(name: str, path: Path, shelf: Shelf) -> None:
    """Show which classes are confused, and the images of a confusion, or the worst of all, of one split."""
    ui.link(
        "Review the labels", find_review(shelf.runs, tables.images_about(path, "root")) or f"/review?run={quote(name)}"
    )
    file = tables.find_images(path)
    split = file.stem.removeprefix("images").strip("_") if file else ""
    ui.label(f"measured on: {split or 'validation'}").classes("muted")
    rows = await asyncio.to_thread(tables.read_newest, path, f"{split}_confusions".strip("_"))
    texts = [escape_controls(f"{row['true']} → {row['predicted']} ({row['count']})") for row in rows]
    pairs = {(row["true"], row["predicted"]): text for row, text in zip(rows, texts)}
    chosen = ui.select({(): "all mistakes, the worst first", **pairs}, value=(), with_input=True).classes("w-full")
    chosen.props("aria-label=mistakes").style("max-width: 480px")
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in (row["true"], row["predicted"])))[:_CLASSES]
        ui.label(f"Per cent of a label's images (row); the {len(names)} most confused classes").classes("muted")
        chart = ui.echart(draw_confused(rows, names), on_point_click=lambda event: choose(*event.data))
        chart.classes("w-full").style(f"height: {140 + 18 * max(10, len(names))}px; max-width: 1000px")
    part = ui.column().classes("w-full")

    def choose(column: int, row: int, _: float) -> None:
        chosen.set_value((names[row], names[column]))

    async def draw() -> None:
        images = await asyncio.to_thread(tables.worst_images, path, _IMAGES, chosen.value, describe_image)
        part.clear()
        with part:
            await show_images(path, shelf, images)

    chosen.on_value_change(draw)
    await draw()


def draw_confused(rows: list[dict[str, str]], names: list[str]) -> Json:
    """Return the ECharts options of the confusions between some classes."""
    at = {name: number for number, name in enumerate(names)}
    cells = [[at.get(row["predicted"]), at.get(row["true"]), round(100 * float(row["share"]), 1)] for row in rows]
    text = {**TEXT, "width": 110, "overflow": "truncate"}
    axis = {"type": "category", "data": [*map(escape_controls, names)]}
    look = {"show": False, "inRange": {"color": [ACCENT], "opacity": [0.2, 1]}}
    return _MATRIX | {
        "xAxis": {**axis, "axisLabel": {**text, "rotate": 90}},
        "yAxis": {**axis, "inverse": True, "axisLabel": {**text, "interval": 0}},
        "visualMap": {"min": 0, "max": 100, **look},
        "series": [{"type": "heatmap", "data": [cell for cell in cells if None not in cell], "animation": False}],
    }


async def show_images(path: Path, shelf: Shelf, rows: list[list[str]] | None) -> None:
    """Show images with lines under them, or the command that finds them."""
    if rows is None:
        ui.label("No table of images yet. This command writes it:").classes("muted")
        show_command(["python", "evaluate.py", f"run_dir={path}", "per_image=true"])
        return
    addresses = await asyncio.to_thread(find_addresses, path, shelf, [name for name, *_ in rows])
    cards = [{"src": address, "texts": [*map(escape_controls, row)]} for row, address in zip(rows, addresses)]
    show_grid("tiles", _TILE, cards)
    if not any(addresses):
        ui.label("These are no images of the run's collection." if rows else "No image is wrong.").classes("muted")


def find_addresses(path: Path, shelf: Shelf, images: list[str]) -> list[str | None]:
    """Return the addresses of images of the run's collection; None for those that it does not have."""
    with suppress(OSError, ValueError, HTTPException):
        collection = shelf.open(name := shelf.of_run(path))
        if str(collection.root) == tables.images_about(path, "root"):  # else evaluate.py measured other data
            rows = find_rows(collection, images).tolist()
            return [image_address(name, collection, row) if row >= 0 else None for row in rows]
    return [None] * len(images)


def describe_image(row: Json) -> list[str]:
    """Return the path, and the lines under an image: label and prediction, or wrong (+) and missed (-) tags."""
    path = str(row["path"])
    if "missed" not in row:
        return [path, str(row.get("label", path)), f"→ {row.get('prediction')} ({row.get('probability', 0):.2f})"]
    probs = dict(zip(row["prediction"], row["probability"]))
    wrong = [f"+ {name} ({probs[name]:.2f})" for name in sorted(row["wrong"], key=probs.get, reverse=True)[:_TAGS]]
    return [path, *wrong, *(f"− {name}" for name in row["missed"][:_TAGS])]
