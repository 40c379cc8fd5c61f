"""The kept weights of runs side by side: a table of their figures, and a picture of what each draws."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.exports.painter import to_png
from engine.task import Report
from utils.errors import UserError
from utils.record.figures import INK
from utils.record.pictures import image_grid, legible, shorten
from utils.record.run_reader import RunReader


def list_weights(runs: Sequence[str]) -> list[tuple[str, int, Path]]:
    """Return run, step and file of all kept weights. Raises UserError (`run_dir`) for a run without any."""
    kept = {run: RunReader(Path(run)).kept for run in runs}
    for run, files in kept.items():
        if not files:
            raise UserError(
                f"run_dir: {run} has kept no weights that could be compared; train with loop.keep_weights_every=500, "
                "for example, which keeps weights/step_000500.safetensors and so on"
            )
    return [(run, step, path) for run, files in kept.items() for step, path in files.items()]


def to_part(run: str, step: int, report: Report) -> dict[str, Any]:
    """Return the figures and the pictures of a report as JSON values."""
    part = {"row": {"run": run, "step": step, **report.scalars}}
    if report.samples:
        texts, images = zip(*report.samples)
        captions = [[(legible(shorten(text, 30)), INK)] for text in texts]
        title = f"{shorten(legible(run), 40)}, step {step:,}"
        drawn = image_grid(images, captions, title, columns=len(images), tile_px=258)  # with a frame
        part["drawn"] = base64.b64encode(to_png(drawn)).decode()
    return part


def to_report(parts: Iterable[dict[str, Any]]) -> Report:
    """Return the table `grid` with a row for each part, and the picture `grid` if they have pictures."""
    parts = list(parts)
    rows = [Image.open(io.BytesIO(base64.b64decode(part["drawn"]))) for part in parts if "drawn" in part]
    width = max((row.width for row in rows), default=0)
    padded = [np.pad(row, ((0, 0), (0, width - row.width), (0, 0)), constant_values=255) for row in rows]
    images = {"grid": np.concatenate(padded)} if padded else {}
    return Report({"weight_files": len(parts)}, {"grid": [part["row"] for part in parts]}, images)
