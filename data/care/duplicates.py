"""Find images that a collection has twice or more, show them, and move all but the largest of each group away."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.care.config import DeduplicateConfig
from data.care.moves import move_out
from data.care.work import Work
from data.crops import find_crops
from data.decode import Decoder
from data.duplicates import SIDE_PX, group_duplicates
from data.facts import Facts, measure_files
from data.image_formats import read_file
from data.scan import list_images
from utils.record.pictures import caption_grid
from utils.record.progress import track

_SHEETS, _SHOWN = 60, 8  # groups in the report, and images of each


def remove_duplicates(work: Work, wanted: DeduplicateConfig) -> str:
    """Write a page of the groups of duplicates, and move or list all but the largest of each.

    Raises UserError as `move_out` does.
    """
    sizes = {image.path: image.size for image in sorted(list_images(work.root))}
    detail = "thumbnail" if wanted.match == "crop" else "pixels"
    facts = dict(zip(sizes, measure_files(work.root, list(sizes), work.data.max_pixels, detail)))

    def rank(path: str) -> tuple[int, int, str]:
        """Put the image of most pixels first, then of most bytes, then by path."""
        return -(facts[path].width or 0) * (facts[path].height or 0), -sizes[path], path

    groups = [sorted(group, key=rank) for group in find_groups(facts, wanted.match)]
    if groups:
        rows = [
            {
                "group": number,
                "path": path,
                "kept": place == 0,
                "width": facts[path].width,
                "height": facts[path].height,
            }
            for number, group in enumerate(groups, start=1)
            for place, path in enumerate(group)
        ]
        shown = [group for group in groups if facts[group[0]].kind is None][:_SHEETS]
        sheets = {
            f"group_{number:03}": _draw_group(work.root, group, facts, work.data.max_pixels)
            for number, group in enumerate(track(shown, len(shown), "drawing the groups"), start=1)
        }
        work.save_report({"groups": len(groups), "images in them": len(rows)}, {"groups": rows}, sheets)
    reasons = {path: f"a duplicate: {group[0]} is kept" for group in groups for path in group[1:]}
    return f"{len(groups):,} groups of duplicates; {move_out(work, reasons)}"


def find_groups(facts: dict[str, Facts], match: str) -> list[list[str]]:
    """Return the paths of each group of two or more, the largest group first.

    match: near: look alike by the perceptual hash; crop: or show a part of another; exact, and where no hash is known:
    have equal bytes.
    """
    keys: dict[str, int | str | None] = {path: fact.sha256 for path, fact in facts.items()}
    if match != "exact":
        hashed = [path for path, fact in facts.items() if fact.phash is not None]
        alike = [find_crops(_read_thumbnails([facts[path] for path in hashed]))] if match == "crop" else []
        found = group_duplicates(np.array([facts[path].phash for path in hashed], np.int64), alike)
        keys |= zip(hashed, found.tolist())
    members: dict[int | str, list[str]] = {}
    for path, key in keys.items():
        if key is not None:
            members.setdefault(key, []).append(path)
    return sorted((group for group in members.values() if len(group) > 1), key=lambda group: -len(group))


def _read_thumbnails(facts: Sequence[Facts]) -> np.ndarray:
    """Return the grey levels of images, uint8 [N, 32, 32]."""
    levels = b"".join(base64.b64decode(fact.thumbnail) for fact in facts)
    return np.frombuffer(levels, np.uint8).reshape(-1, SIDE_PX, SIDE_PX)


def _draw_group(root: Path, group: Sequence[str], facts: dict[str, Facts], max_pixels: int) -> np.ndarray:
    """Draw the first images of a group with their paths and sizes; what is kept in blue."""
    shown = group[:_SHOWN]
    captions = [
        [(path.rpartition("/")[2], place == 0), (f"{facts[path].width} x {facts[path].height}", place == 0)]
        for place, path in enumerate(shown)
    ]
    decoder = Decoder(3, max_pixels)
    pixels = [decoder(read_file(root / path), path).permute(1, 2, 0).numpy() for path in shown]
    return caption_grid(pixels, captions, f"{len(group):,} images like {group[0]}")
