"""What a page shows of an image of a collection, and the decisions on the marked images."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags

from data.collection.collection import Collection
from data.images.convert import convert, load_upright
from data.images.open import open_image
from data.layouts.corrections import Decision, decide
from data.layouts.table import TAG_LISTS
from data.stream.source import UnreadableImage
from utils.formats.spelling import category_name, parse_tag
from viewer.images import Shelf, rows_of_paths


def describe_image(shelf: Shelf, name: str, collection: Collection, row: int) -> dict[str, str]:
    """Return what the collection and the file say of an image: columns, tags by category, EXIF, or why not."""
    facts = {"file": f"{collection.root}/{collection.row(row).path}"}
    for column, value in collection.table.slice(row, 1).to_pylist()[0].items():
        for text in value or () if column in TAG_LISTS else ():
            key = f"{column}: {category_name(parse_tag(text).category or 0)}"
            facts[key] = f"{facts[key]}, {text}" if key in facts else text
        if value is not None and column not in TAG_LISTS:
            facts[column] = str(value)
    try:
        with open_image(shelf.read(name, collection, row), facts["path"], shelf.config(name).max_pixels) as image:
            facts |= {"format": image.format, "pixels": f"{image.width} x {image.height}, {image.mode}"}
            facts |= {ExifTags.TAGS.get(key, str(key)): str(value)[:200] for key, value in image.getexif().items()}
            convert(load_upright(image), 3, None)  # whether it can be decoded
    except UnreadableImage as error:
        facts["unreadable"] = error.reason
    return facts


def take_images(collection: Collection, paths: Iterable[str]) -> pa.Table:
    """Return the rows of some images."""
    rows = rows_of_paths(collection, [*paths])
    return collection.table.take(np.sort(rows[rows >= 0]))


def decide_all(
    collection: Collection, paths: Iterable[str], field: str, change: Callable[[Any], Any], by: str
) -> list[Decision]:
    """Return decisions on images: what `change` makes of a field, where that is another value. by: the page's tab."""
    rows = take_images(collection, paths).to_pylist()
    values = [(row["path"], row.get(field), change(row.get(field))) for row in rows]
    return [decide(path, field, was, now, "edited", by) for path, was, now in values if was != now]
