"""A table of posts as Danbooru gives them, at the root of a collection: posts.parquet or posts.jsonl.

The image of a post is named by its id or md5, in any folder and any format: `0123/4000123.jpg`,
`ab/ab12....webp`, `4000123.png`. Posts are parsed like other records (data/layouts/records.py).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.layouts.folders import build_rows, list_images, scan_folder
from data.layouts.manifest import find_one
from data.layouts.records import Sidecar, is_field, parse_record
from data.layouts.sidecars import read_lines, refuse_link_out
from data.layouts.unused import Unused
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

POSTS = ("posts.parquet", "posts.jsonl")


def read_folder(root: Path, unused: Unused) -> pa.Table:
    """Read a collection without a manifest: its table of posts, else its folders and sidecars."""
    file = find_one(root, POSTS)
    return scan_folder(root, unused) if file is None else read_posts(root, file, unused)


def read_posts(root: Path, file: Path, unused: Unused) -> pa.Table:
    """Read the posts with an image into a table, sorted by path. Logs how many posts have none.

    Raises UserError (`data.root`) with the file name if it cannot be read, or if no post has an image.
    """
    refuse_link_out(root, file)
    images = list_images(root, unused)
    by_name = {os.path.splitext(os.path.basename(path))[0]: path for path in sorted(images)}
    sidecars: dict[str, Sidecar] = {}
    count, tried = 0, []
    for count, (where, post) in enumerate(_read(file), start=1):
        names = [str(post[name]) for name in ("id", "md5") if post.get(name) is not None]
        tried += names if count <= 3 else []
        path = next((by_name[name] for name in names if name in by_name), None)
        if path is not None and path not in sidecars:
            sidecars[path] = parse_record(where, post)
    if not sidecars:
        raise UserError(
            f"data.root: none of the {count:,} posts of {str(file)!r} has an image: {str(root)!r} holds "
            f"{len(images):,}, none of them {', '.join(f'{name}.*' for name in tried)}; name images by id or md5"
        )
    log.info(
        "%s: %s of %s posts have an image (the others have none, or are repeated)",
        file.name, f"{len(sidecars):,}", f"{count:,}",
    )  # fmt: skip
    unused.add(f"images without a post in {file.name}", *(path for path in images if path not in sidecars))
    sizes = {path: images[path] for path in sidecars}
    return build_rows(sizes, ["train"] * len(sidecars), list(sidecars.values()))


def _read(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each post with its position, for messages."""
    if file.suffix == ".jsonl":
        yield from read_lines(file)
        return
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(columns=[*filter(is_field, parquet.schema_arrow.names)]):
                yield from ((f"a post of {str(file)!r}", post) for post in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); repair it or make it again") from error
