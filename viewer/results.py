"""Parts of a run's page that show its evaluation: tables, thresholds, mistakes and their images."""

import asyncio
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from fastapi import HTTPException
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record import tables
from utils.record.figures import show_name
from utils.record.run_index import is_own_run
from viewer.images import Shelf, image_address, rows_of_paths
from viewer.parts import COLOURS, Cards, Part, Sheet, make_card, show_command, show_heading
from viewer.review import find_review
from viewer.site import RunTab

_IMAGES = 48  # shown at once
_TAGS = 4  # under an image


class ThresholdCharts(Part, component="vue/thresholds.vue"):
    """Precision, recall and F1 at a threshold that is moved."""


class Tables(RunTab):
    """A run's tables of tags or classes, and what follows from a threshold of their probabilities."""

    async def show(self) -> None:
        """Show the tables."""
        self._files = await asyncio.to_thread(tables.find_tables, self.path)
        if self._files:
            await Sheet("table", [*self._files], "", self._read).fill()
        else:
            ui.label("No tables yet: evaluations write them.").classes("muted")
        groups = {}
        for name, decisions in (await asyncio.to_thread(tables.read_decisions, self.path)).items():
            reliable = tables.reliability(decisions).T.tolist()
            groups[escape_controls(name)] = {"table": decisions.tolist(), "reliable": reliable}
        if groups:
            show_heading("Thresholds", 2)
            ThresholdCharts(groups=groups, colours=COLOURS)

    def _read(self, name: str) -> tuple[Json, list[Json]]:
        names, rows = tables.read_csv(self._files[name])
        labels = {name: escape_controls(show_name(name)) for name in names}
        return labels, [{**dict(zip(names, map(tables.to_cell, row))), "": place} for place, row in enumerate(rows)]


class Matrix(Part, component="vue/matrix.vue"):
    """Confusions of classes."""


class Mistakes(RunTab):
    """Which classes are confused, and the images of a confusion, or the worst of all, of one split."""

    async def show(self) -> None:
        """Show the confusions, and the worst images."""
        review = find_review(self.site.shelf.runs, tables.images_about(self.path, "root"))
        ui.link("Review the labels", review or f"/review?run={quote(self.name)}")
        file = tables.find_image_table(self.path)
        split = file.stem.removeprefix("images").strip("_") if file else ""
        ui.label(f"measured on: {split or 'validation'}").classes("muted")
        rows = await asyncio.to_thread(tables.read_newest, self.path, f"{split}_confusions".strip("_"))
        texts = [escape_controls(f"{row['true']} → {row['predicted']} ({row['count']})") for row in rows]
        pairs = {(row["true"], row["predicted"]): text for row, text in zip(rows, texts)}
        choices = {(): "all mistakes, the worst first", **pairs}
        self._pair = ui.select(choices, value=(), with_input=True, on_change=self._draw).classes("w-full")
        self._pair.props("aria-label=mistakes").style("max-width: 480px")
        if rows:
            cells = [[row["true"], row["predicted"], row["share"]] for row in rows]
            matrix = Matrix(cells=[[*map(escape_controls, cell)] for cell in cells])
            matrix.on("choose", lambda event: self._pair.set_value((*cells[event.args][:2],)))
        self._part = ui.column().classes("w-full")
        await self._draw()

    async def _draw(self) -> None:
        images = await asyncio.to_thread(tables.worst_images, self.path, _IMAGES, self._pair.value, describe_prediction)
        self._part.clear()
        with self._part:
            await show_images(self.path, self.site.shelf, images)


async def show_images(path: Path, shelf: Shelf, rows: list[list[str]] | None) -> None:
    """Show images with lines under them, or the command that finds them."""
    if rows is None:
        ui.label("No table of images yet. This command writes it:").classes("muted")
        show_command(["python", "evaluate.py", f"run_dir={path}", "per_image=true"])
        return
    addresses = await asyncio.to_thread(find_addresses, path, shelf, [name for name, *_ in rows])
    Cards(cards=[make_card(address, *row) for row, address in zip(rows, addresses)])
    if not any(addresses):
        ui.label("These are no images of the run's collection." if rows else "No image is wrong.").classes("muted")


def find_addresses(path: Path, shelf: Shelf, images: list[str]) -> list[str | None]:
    """Return the addresses of images of the run's collection; None for an image that the collection lacks."""
    with suppress(OSError, ValueError, HTTPException):
        collection = shelf.open(name := shelf.of_run(path))
        if str(collection.root) == tables.images_about(path, "root") or not is_own_run(path):  # else of other data
            rows = rows_of_paths(collection, images).tolist()
            return [image_address(name, collection, row) if row >= 0 else None for row in rows]
    return [None] * len(images)


def describe_prediction(row: Json) -> list[str]:
    """Return the path, and the lines under an image: label and prediction, or wrong (+) and missed (-) tags."""
    path = str(row["path"])
    if "missed" not in row:
        return [path, str(row.get("label", path)), f"→ {row.get('prediction')} ({row.get('probability', 0):.2f})"]
    probs = dict(zip(row["prediction"], row["probability"]))
    wrong = [f"+ {name} ({probs[name]:.2f})" for name in sorted(row["wrong"], key=probs.get, reverse=True)[:_TAGS]]
    return [path, *wrong, *(f"− {name}" for name in row["missed"][:_TAGS])]
