"""A table of posts as Danbooru gives them, at the root of a collection: posts.parquet, posts.jsonl or posts.json.

Read are id, md5, rating, tag_string and tag_string_<category>. A post's image is the file that is named by its id or
its md5, in any folder and of any format: `0123/4000123.jpg`, `ab/ab12....webp`, `4000123.png`.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from data.manifest import find_one
from data.manifest_formats import BOM, fill_columns, read_parquet
from data.scan import list_images, scan_folder
from data.table import sort_rows
from data.tags.records import STATED, parse_json
from data.tags.sidecars import read_text, refuse_link_out
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

POSTS = ("posts.parquet", "posts.jsonl", "posts.json")
_STRINGS = {name: f"tag_string_{name}" for name in ("general", *STATED)}
_TEXTS = ("md5", "rating", "tag_string", *_STRINGS.values())
_SCHEMA = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in _TEXTS)])
_BLOCK_BYTES = 2**26  # of JSONL; a post must fit


def read_folder(root: Path) -> pa.Table:
    """Read a collection that has no manifest: by its table of posts, or else its folders and sidecars."""
    file = find_one(root, POSTS)
    return scan_folder(root) if file is None else read_posts(root, file)


def read_posts(root: Path, file: Path) -> pa.Table:
    """Read the posts that have an image into a table of SCHEMA and `id`, sorted by path. Logs how many have none.

    Raises UserError (`data.root`) naming the file where it cannot be read, lacks a column, or has no post with an image
    here.
    """
    refuse_link_out(root, file, repr(str(file)))
    posts, images = _read_table(file), list_images(root)
    place = _place_posts(posts, [image.path for image in images])
    _, first = np.unique(place, return_index=True)
    rows = np.sort(first[place[first] >= 0])
    if len(rows) == 0:
        some = posts.slice(0, 3).to_pylist()
        tried = ", ".join(f"{name}.*" for post in some for name in (post["id"], post["md5"]) if name is not None)
        raise UserError(
            f"data.root: none of the {len(posts):,} posts of {str(file)!r} has an image: {str(root)!r} holds "
            f"{len(images):,}, none of them {tried}; name images by id or md5"
        )
    log.info(
        "%s: %s of %s posts have an image (the others have none, or are repeated), %s of %s images a post",
        file.name, f"{len(rows):,}", f"{len(posts):,}", f"{len(rows):,}", f"{len(images):,}",
    )  # fmt: skip
    is_kept = np.zeros(len(posts), bool)
    is_kept[rows] = True
    posts, images = posts.filter(pa.array(is_kept)), [images[index] for index in place[rows]]
    columns = {
        "path": pa.array([image.path for image in images]),
        "size": pa.array([image.size for image in images]),
        "split": pa.array(["train"] * len(images)),
        "tags": _split_tags(posts),
        "rating": posts["rating"],
    }
    if posts["id"].null_count < len(posts):
        columns["id"] = posts["id"]
    return sort_rows(fill_columns(columns, len(posts)))


def _place_posts(posts: pa.Table, paths: list[str]) -> np.ndarray:
    """Return the position of each post's image among the paths, int64 [N]; -1 for none."""
    stems = pa.array([os.path.splitext(os.path.basename(path))[0] for path in paths], pa.string())
    by_id = pc.index_in(posts["id"].cast(pa.string()), value_set=stems)
    return pc.coalesce(by_id, pc.index_in(posts["md5"], value_set=stems)).fill_null(-1).to_numpy().astype(np.int64)


def _split_tags(posts: pa.Table) -> pa.ChunkedArray:
    """Return the lists of tags, with the category where it is stated: of tag_string_*, else of tag_string."""
    texts = {name: posts[column].fill_null("") for name, column in _STRINGS.items()}
    stated = [pc.replace_substring_regex(texts[name], r"(\S+)", rf"{name}:\1") for name in STATED]
    joined = pc.ascii_trim_whitespace(pc.binary_join_element_wise(texts["general"], *stated, " "))
    text = pc.if_else(pc.equal(joined, ""), pc.ascii_trim_whitespace(posts["tag_string"].fill_null("")), joined)
    return pc.ascii_split_whitespace(pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text))


def _read_table(file: Path) -> pa.Table:
    """Read a table of posts in the columns of _SCHEMA; absent ones are null."""
    try:
        table = _READ[file.suffix](file)
        columns = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in _SCHEMA
        ]
        posts = pa.Table.from_arrays(columns, schema=_SCHEMA)
        posts.validate(full=True)  # Arrow's reader of JSON does not check UTF-8
    except UserError:  # which is a ValueError
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); repair it or make it again") from error
    for names in (("id", "md5"), ("tag_string", *_STRINGS.values())):
        if all(posts[name].null_count == len(posts) for name in names):
            raise UserError(f"data.root: {str(file)!r} states none of {', '.join(names)}; a post needs one of them")
    return posts


def _read_parquet(file: Path) -> pa.Table:
    return read_parquet(file, _SCHEMA.names)


def _read_jsonl(file: Path) -> pa.Table:
    with open(file, "rb") as stream:
        stream.seek(len(BOM) if stream.read(len(BOM)) == BOM else 0)
        return pa.json.read_json(
            stream,
            read_options=pa.json.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=pa.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
        )


def _read_json(file: Path) -> pa.Table:
    """Read one list of posts. Raises ValueError where it is none, ArrowException where a value is of another type."""
    posts = parse_json(read_text(file))
    if not isinstance(posts, list) or not all(isinstance(post, dict) for post in posts):
        raise ValueError("it holds no list of objects")
    return pa.Table.from_pylist(posts, schema=_SCHEMA)


_READ = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_json}
