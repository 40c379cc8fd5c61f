"""What Atelier writes is what it reads: any tags, categories, ratings and probabilities, through all forms."""

import json
import shutil
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.tags.rules import TagRules, TextConfig
from data.tags.tag_index import map_tags
from data.tools.predictions import ImageList, RowFile, Sidecars, spell_tags
from models.outputs import OUTPUTS, RowOptions
from tests.data.collection.test_collection import load, put
from tests.support import pack_collection, write_manifest
from utils.formats.spelling import CATEGORIES, RATINGS, join_tags, parse_tag
from utils.formats.vocabulary import FILE, Vocabulary, read_vocabulary, write_vocabulary

HOSTILE = ["a,b", "a\\,b", "a\\", "\\(", "(a:1)", "(:3)", "meta:x", "general:x", "rating:explicit", "general", "nan"]
HOSTILE += ["_a", "a__b", '"', "'", "#", "a.", "a_b_c_d.", "_".join("abcdefghijklmn"), "^_^", "re:zero", "1.5", "{}"]
NAMES = (st.sampled_from(HOSTILE) | st.text(max_size=8)).map(lambda text: parse_tag(f"general:{text}").name)
NAMES = NAMES.filter(lambda name: name and unicodedata.normalize("NFC", name.lower()) == name)
TAGS = st.lists(st.tuples(st.sampled_from([0, 1, 3, 4, 5]), NAMES), min_size=1, max_size=6, unique=True)
TEXTS = st.fixed_dictionaries(
    {"spaces": st.booleans(), "escape": st.booleans(), "separator": st.sampled_from([", ", ",", "\n"]),
     "order": st.sampled_from(["score", "vocabulary"]), "category_order": st.sampled_from([[], ["character"]])}
)  # fmt: skip
NO_RULES = TagRules(None, {}, {}, "x.")
PLAIN = {"spaces": False, "escape": False, "separator": ", ", "order": "score", "category_order": []}
FUZZ = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def predict(keys, probable, text, **config):
    """Return the vocabulary of tags, and the row and text that predict.py writes for an image with all of them."""
    known = Vocabulary.of([*((9, name) for name in RATINGS), *keys])
    values = np.array([*(0.9 * (name == probable) for name in RATINGS), *np.linspace(0.6, 0.9, len(keys))], np.float32)
    plain = {"first_tags": [], "drop_implied": None, "aliases": None}
    config = TextConfig(**text, **plain, max_tags=None, exclude=[], **config)
    options = RowOptions(known.names, np.array(known.categories), True, 1, np.float32(0.5), order=config.order)
    row = OUTPUTS["tags"].make_row(values, options)
    return known, {"path": "a.png", **row, "tags": join_tags(spell_tags(row, config, NO_RULES), config.separator)}


def read(root, known, cache):
    found = map_tags(load(root, cache).table, known, NO_RULES)
    return {list(known.columns)[column] for column in found.of_row(0)}


@FUZZ
@example([(0, "general")], "general", PLAIN)
@example([(0, "miku"), (4, "miku"), (0, "meta:x"), (1, "meta:x")], "general", PLAIN)
@given(TAGS, st.sampled_from(list(RATINGS)), TEXTS)
def test_tags_come_back_from_every_form(keys, rating, text):
    wanted = {*keys, (9, rating)}
    root = Path(tempfile.mkdtemp())
    try:
        image = put(root / "in", "a.png") / "a.png"
        whole, row = predict(keys, rating, text, categories=True, rating="first")
        Sidecars(ImageList(str(root / "in"), [image]), None, replace=True).write_each([{**row, "path": str(image)}])
        assert read(root / "in", whole, root / "cache") == wanted, (root / "in/a.txt").read_text()

        pack_collection(load(root / "in", root / "cache"), root / "packed")
        assert read(root / "packed", whole, root / "cache") == wanted
        (root / "packed/manifest.parquet").unlink()
        assert read(root / "packed", whole, root / "cache") == wanted  # as WebDataset
        write_manifest(root / "in")
        assert read(root / "in", whole, root / "cache") == wanted

        put(root / "lines", "a.png")
        lines, plain = root / "lines/meta_tags.jsonl", predict(keys, rating, text, categories=False, rating=None)[1]
        RowFile(lines, [], keep=False).write_all([plain])
        assert read(root / "lines", whole, root / "cache") == wanted, lines.read_text()
        (line,) = [json.loads(line) for line in lines.read_text("utf-8").split("\n") if line]
        probs = {(CATEGORIES[name], tag): prob for name, tags in line["probs"].items() for tag, prob in tags.items()}
        assert probs == dict(zip(keys, np.linspace(0.6, 0.9, len(keys)).round(6))) and line["rating_prob"] == 0.9
        put(root / "table", "a.png")
        RowFile(root / "table/manifest.csv", ["path", "rating", "tags"], keep=False).write_all([row])
        assert read(root / "table", whole, root / "cache") == wanted
        write_vocabulary(root / FILE, whole)
        assert read_vocabulary(root / FILE) == whole
    finally:
        shutil.rmtree(root)
