"""The root over a collection is that of another computation; a proof shows what is there and what is not."""

import json

import pytest

from data.images.merkle import check, hash_json, hash_nodes, prove
from tests.support import refuses
from utils.io.files import sha256_text

PAIRS = [(sha256_text(f"image {number}") + sha256_text(f"row {number}"), f"row {number}") for number in range(300)]
ROWS = dict(sorted(PAIRS))


@pytest.mark.parametrize("number, found", [(7, ["row 7"]), (300, [])])
def test_a_proof_shows_what_is_there_and_what_is_not(number, found):
    nodes = {leaf[:3]: [other for other in ROWS if other[:3] == leaf[:3]] for leaf in ROWS}
    hashes = {digits: sha256_text(json.dumps(node, separators=(",", ":"))) for digits, node in nodes.items()}
    root = hash_json(hashes)
    assert hash_nodes(ROWS) == hashes
    image = sha256_text(f"image {number}")
    proof = prove(ROWS, image)
    assert check(proof, image, root) == found
    with refuses("source"):
        check({**proof, "rows": ["row 8"]}, image, root)
