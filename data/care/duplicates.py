"""Find images that a collection has twice or more, show them, and exclude all but the largest of each group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from data.care.finder import Finder, excluded_by_others
from data.care.tool import save_report
from data.config import DataConfig
from data.decode import Decoder
from data.duplicates import group_duplicates
from data.facts import Facts, measure_files
from data.image_formats import read_file
from data.scan import check_root, list_images
from utils.record.pictures import RIGHT, WRONG, image_grid, legible, shorten
from utils.record.progress import track

_SHEETS, _SHOWN = 60, 8  # groups in the report, and images of each


class Duplicates(Finder):
    """Write a page of the groups of duplicates, and exclude or list all but the largest of each.

    match: near: look alike, mirrored too; exact: files of equal bytes.
    """

    name: Literal["duplicates"]
    match: Literal["near", "exact"]

    def find(self, data: DataConfig) -> dict[str, str]:
        """Return all but one of each group. Raises UserError (`data.root`, `job.report`)."""
        root = check_root(data.root)
        out = excluded_by_others(root, self.name)  # else one of them could be kept, and its whole group lost
        sizes = {image.path: image.size for image in sorted(list_images(root)) if image.path not in out}
        facts = dict(zip(sizes, measure_files(root, list(sizes), data.max_pixels)))

        def rank(path: str) -> tuple[int, int, str]:
            """Put the image of most pixels first, then of most bytes, then by path."""
            return -(facts[path].width or 0) * (facts[path].height or 0), -sizes[path], path

        groups = [sorted(group, key=rank) for group in find_groups(facts, self.match)]
        rows = [
            {"group": number, "path": path, "kept": place == 0} | facts[path].size()
            for number, group in enumerate(groups, start=1)
            for place, path in enumerate(group)
        ]
        shown = [group for group in groups if facts[group[0]].kind is None][:_SHEETS]
        sheets = {
            f"group_{number:03}": _draw_group(root, group, Decoder(3, data.max_pixels))
            for number, group in enumerate(track(shown, len(shown), "drawing the groups"), start=1)
        }
        figures = {"groups": len(groups), "images in them": len(rows)}
        save_report(Path(self.report) / self.name, str(root), figures, {"groups": rows}, sheets)
        return {path: f"a duplicate: {group[0]} is kept" for group in groups for path in group[1:]}


def find_groups(facts: dict[str, Facts], match: str) -> list[list[str]]:
    """Return the paths of each group of two or more, the largest group first.

    match: near: look alike by the perceptual hash; exact, and where no hash is known: have equal bytes.
    """
    keys: dict[str, int | str | None] = {path: fact.sha256 for path, fact in facts.items()}
    if match != "exact":
        hashed = [path for path, fact in facts.items() if fact.phash is not None]
        found = group_duplicates(np.array([facts[path].phash for path in hashed], np.int64))
        keys |= zip(hashed, found.tolist())
    members: dict[int | str, list[str]] = {}
    for path, key in keys.items():
        if key is not None:
            members.setdefault(key, []).append(path)
    return sorted((group for group in members.values() if len(group) > 1), key=lambda group: -len(group))


def _draw_group(root: Path, group: Sequence[str], decoder: Decoder) -> np.ndarray:
    """Draw the first images of a group with their names and sizes; what is kept in blue."""
    pixels, captions = [], []
    for path in group[:_SHOWN]:
        pixels.append(decoder(read_file(root / path), path).permute(1, 2, 0).numpy())
        height, width = pixels[-1].shape[:2]
        texts, color = (path.rpartition("/")[2], f"{width} x {height}"), RIGHT if path == group[0] else WRONG
        captions.append([(shorten(legible(text), 30), color) for text in texts])
    title = f"{len(group):,} images like {shorten(legible(group[0]), 60)}"
    return image_grid(pixels, captions, title, columns=4, tile_px=226)
