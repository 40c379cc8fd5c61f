"""A Merkle tree over a collection: one hash commits to every image and to all that is known of it.

    rows = list_leaves(collection, cache)
    root = hash_json(hash_nodes(rows))
    proof = prove(rows, digest)          that an image was in the collection, and with what row, or that it was not
    rows = check(proof, digest, root)

A leaf is the SHA-256 of an image's file (nothing for an unreadable one) and that of its row: path, label, tags,
caption, split, weight. The tree has two levels: a node is of all leaves with the same first digits, the root of all
nodes. A proof has the nodes and the leaves of one, so it shows the row of one image, and of others only hashes.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from data.collection.collection import Collection
from data.images.sizes import image_hashes
from data.layouts.table import SCHEMA
from utils.errors import UserError
from utils.io.files import Json, Values, canonical_json, sha256_text

_first = itemgetter(slice(3))  # hexadecimal digits: at most 4,096 nodes


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return sha256_text(canonical_json(value))


def list_leaves(collection: Collection, cache: Path) -> dict[str, str]:
    """Return the rows of a collection by their leaves, sorted. cache: of the hashes of files, as `image_hashes`."""
    images = image_hashes(collection, np.arange(len(collection)), cache)
    rows = map(canonical_json, collection.table.select(SCHEMA.names).to_pylist())
    return dict(sorted((image + sha256_text(row), row) for image, row in zip(images, rows)))


def hash_nodes(leaves: Iterable[str]) -> dict[str, str]:
    """Return the hash of each node by the first digits of its leaves, which are sorted."""
    return {digits: hash_json(list(node)) for digits, node in groupby(leaves, _first)}


def prove(rows: Mapping[str, str], image: str) -> Json:
    """Return the proof for the image with a SHA-256. rows: of `list_leaves`."""
    leaves = [leaf for leaf in rows if _first(leaf) == _first(image)]
    found = [rows[leaf] for leaf in leaves if leaf.startswith(image)]
    return {"rows": found, "leaves": leaves, "nodes": hash_nodes(rows)}


def check(proof: Values, image: str, root: str) -> list[str]:
    """Return the rows of an image; none: it was not in the collection. Raises UserError for a proof of neither."""
    nodes, leaves, rows = proof["nodes"], proof["leaves"], proof["rows"]
    is_whole = hash_json(nodes) == root and nodes.get(_first(image), hash_json([])) == hash_json(leaves)
    found = [leaf for leaf in leaves if leaf.startswith(image)]
    if not is_whole or found != [image + sha256_text(row) for row in rows]:
        raise UserError("source: the proof is of another image or collection than the chain's, or was changed")
    return rows
