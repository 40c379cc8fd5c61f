"""Terms over the columns of a collection."""

import json

import pytest

from data.collection.search import Search, quote_value
from tests.data.collection.test_collection import load
from tests.support import refuses

SIZES, WIDE = {"width": 100, "height": 50}, {"width": 300, "height": 300}
ROWS = [
    {"path": "a.png", "label": "cat", "tags": ["1girl", "character:Hatsune Miku", 'a "b" \\*'], "a b": 0.5, **SIZES},
    {"path": "b.png", "label": "o", "tags": ["hat", "red hat"], "group": 2, "split": "val", **WIDE},
    {"path": "c.png", "group": 1, "caption": "<script>", "weight": 0.0},
]  # fmt: skip
ROWS[0] |= {"caption": "A Red house", "group": 1}


@pytest.fixture
def search(tmp_path):
    (tmp_path / "root").mkdir()
    for row in ROWS:
        (tmp_path / "root" / row["path"]).write_bytes(b"x")
    (tmp_path / "root/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Search(load(tmp_path / "root", tmp_path / "cache"))


@pytest.mark.parametrize("text, rows", [
    ("", "abc"), ("1girl", "a"), ("-1girl", "bc"), ("hat", "b"), ("*hat", "b"), ('"red hat"', "b"), ("red_hat", "b"),
    ("character:*", "a"), ("hatsune_miku", "a"), ("general:*", "ab"), ("artist:*", ""), ("label=cat", "a"),
    (quote_value(ROWS[0]["tags"][2]), "a"), ("label=ca", ""), ("label:CA", "a"), ("-label=cat", "bc"), ("tags>1", "ab"),
    ('caption:"red house"', "a"), ("split=val", "b"), ("width>=300", "b"), ("width<300", "a"), ("-width<300", "bc"),
    ("aspect>1", "a"), ("copies>1", "ac"), ("copies>0", "acb"), ("weight=0", "c"), ('"a b"<=0.5', "a"),
    ("width<300 OR label=o", "ab"), ("-label=o hat OR (", ""),
    ("path:c.p", "c"), ("(", ""), ('"', "a"), ("caption:<script", "c"),
    ("CAT", "a"), ("girl", "a"), ("house", "a"), ("-script c.png", ""), ("C.PN", "c"), ("miku hat", ""),
])  # fmt: skip
def test_terms(search, text, rows):
    assert [search.collection.row(row).path[0] for row in search.find(text)] == list(rows)


@pytest.mark.parametrize(
    "term", ["nothing>3", "lable:cat", "unknown_tags:x", "width>wide", "label<3", "hat OR", "OR hat"]
)
def test_a_term_that_cannot_be_compared_is_named(search, term):
    with refuses(term[:5]):
        search.find(term)


def test_values_are_counted(search):
    assert len(search.count(search.find(""), "tags")) == 5 and search.count(search.find("hat"), "tags")["red hat"] == 1
    assert (
        search.count(search.find("-split=val"), "label") == {"cat": 1} and search.count(search.find("("), "tags") == {}
    )
