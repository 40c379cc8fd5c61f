"""The root over a collection is that of another computation; a proof shows what is there and what is not."""

import hashlib
import json

import pytest

from data.images.merkle import check, hash_json, hash_nodes, prove
from tests.support import refuses


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


ROWS = {sha(f"image {number}") + sha(f"row {number}"): f"row {number}" for number in range(300)}
ROWS = dict(sorted(ROWS.items()))
ROOT = hash_json(hash_nodes(ROWS))


def hash_list(value):
    return sha(json.dumps(value, separators=(",", ":")))


def test_the_root_is_of_the_hashes_of_the_leaves_with_equal_digits():
    nodes = {}
    for leaf in ROWS:
        nodes[leaf[:3]] = [*nodes.get(leaf[:3], []), leaf]
    assert ROOT == hash_list({digits: hash_list(node) for digits, node in nodes.items()})


@pytest.mark.parametrize("number, found", [(7, ["row 7"]), (300, []), (5000, [])])
def test_a_proof_shows_what_is_there_and_what_is_not(number, found):
    image = sha(f"image {number}")
    proof = json.loads(json.dumps(prove(ROWS, image)))
    assert check(proof, image, ROOT) == found
    for forged in ({"rows": [*found, "row 8"]}, {"leaves": ["0" * 128]}, {"nodes": {}}):
        with refuses("source"):
            check({**proof, **forged}, image, ROOT)
