"""Tags as outputs of a vocabulary, and vocabularies: literal cases and refusals."""

import json

import numpy as np
import pyarrow as pa
import pytest

from data.layouts.table import build_table
from data.tags.rules import TagRules, TagRulesConfig, VocabularyConfig, read_rules
from data.tags.tag_index import index_tags, map_tags
from data.tags.vocabulary import make_vocabulary
from tests.data.collection.test_collection import load
from tests.in_process import run
from tests.support import placed, refuses
from utils.formats.spelling import RATINGS
from utils.formats.vocabulary import Vocabulary, read_any_vocabulary

NO_RULES = TagRules(None, {}, {}, "task.")


def vocabulary(*tags, ratings=True):
    """Return the ratings and tags: (category, name), or a name for a general one."""
    keys = [(9, name) for name in RATINGS] if ratings else []
    return Vocabulary.of([*keys, *((0, tag) if isinstance(tag, str) else tag for tag in tags)])


def collection_of(root, rows):
    """Return a collection of a manifest; the files are empty."""
    for row in rows:
        placed(root / row["path"]).touch()
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load(root, root / ".cache")


def of_rows(tags, ratings=None):
    paths = [f"{number:03}" for number in range(len(tags))]
    return build_table({"path": paths, "tags": tags, "rating": ratings or [None] * len(tags)})


def rows_of(found):
    return [found.of_row(row).tolist() for row in range(len(found.tagged))]


def rules_of(root, aliases="", implications="", rating_s=None):
    (root / "aliases.csv").write_text(aliases)
    (root / "implications.csv").write_text(implications)
    return read(root, rating_s=rating_s)


def read(root, **changes):
    files = {name: str(root / f"{name}.csv") for name in ("aliases", "implications")}
    return read_rules(TagRulesConfig(**{"rating_s": None, **files, **changes}), "task.")


# Mapping.


def test_tags_and_ratings_become_outputs(log):
    tags = [
        ["Long Hair", "long_hair", "(smile:1.1)", "gone", "gone "],
        ["miku", "character:miku", "artist:miku", "rating:general"],
        ["rating:e", "rating:g"],
        ["explicit"],
        ["rating:e", " "],
        [],
    ]
    known = vocabulary("smile", "long_hair", (4, "miku"))
    found = map_tags(of_rows(tags, ["q", None, None, "weird", "1", None]), known, NO_RULES)
    assert rows_of(found) == [[2, 4, 5], [0, 6], [], [], [1], []]
    assert found.ids.dtype == np.int32 and found.offsets.dtype == np.int64
    assert [len(found.unknown_of(row)) for row in range(6)] == [0, 0, 4, 4, 0, 4]
    assert found.tagged.tolist() == [True, True, False, False, False, False]
    assert found.describe(known) == "2 of 6 images have a tag of the vocabulary, 3 a known rating"
    assert log.messages[-1].startswith("4 tags are not in the vocabulary, such as 'gone', ")


UNKNOWN = {
    ("Long Hair",): {"long_hair"},
    ("kitty",): {"cat"},
    ("character:*", "smile"): {"miku", "smile"},
    ("-general:*", "*"): {"miku"},
    ("-smile", "-character:miku", "*"): {"long_hair", "cat"},
    ("-smile",): set(),
}


@pytest.mark.parametrize("texts, names", UNKNOWN.items())
def test_what_is_unknown_is_stated_by_tag_by_category_or_for_all_but_some(tmp_path, texts, names):
    known = vocabulary("smile", "long_hair", "cat", (4, "miku"))
    table = of_rows([["smile", "gone"], ["miku"]], ["g", None])
    table = table.append_column("unknown_tags", pa.array([list(texts), None], pa.list_(pa.string())))
    found = map_tags(table, known, rules_of(tmp_path, "kitty,cat\n"))
    assert {known.names[output] for output in found.unknown_of(0)} == names
    assert found.unknown_of(1).tolist() == [0, 1, 2, 3]
    counts = dict(zip(known.names, found.count_known(np.arange(2), len(known))))
    assert all(counts[name] == (1 if name in names - {"smile"} else 2) for name in known.names[4:])
    for spoken_of, unused in (((), ["long_hair", "cat"]), (["cat"], ["long_hair"]), (["*", "-cat"], ["cat"])):
        found = map_tags(table, known, NO_RULES, spoken_of).unknown_of(1)
        assert [known.names[output] for output in found[4:]] == unused


def test_aliases_and_implications(tmp_path):
    aliases = "antecedent_name,consequent_name\ncat ears,animal ears\nkitty,cat\ncat,character:Felix\n"
    rules = rules_of(tmp_path, aliases, "felix,tail\n\ntail,animal\nlost,tail\n")
    table = of_rows([["kitty"], ["cat_ears", "artist:kitty"], ["lost"]])
    found = map_tags(table, vocabulary("animal", "animal_ears", (4, "felix"), "tail", ratings=False), rules)
    assert rows_of(found) == [[0, 2, 3], [0, 1, 2, 3], [0, 3]]
    assert "antecedent_name" not in rules.aliases
    assert rules.hash != rules_of(tmp_path, "kitty,cat\n").hash != NO_RULES.hash


def test_bad_rules_are_refused_by_line(tmp_path):
    for aliases, implications, message in (
        ("a,b\nb,c\nc,a\n", "", "^task.aliases: .* c -> a"),
        ("", "a,b\nb,a\n", "^task.implications: .* -> "),
        ("", "x,y\na\n", r"^task.implications: .*csv, line 2: \['a'\]"),
        ("", "a,  \n", r"^task.implications: .*csv, line 1: "),
    ):
        with refuses(message):
            rules_of(tmp_path, aliases, implications)
    with refuses(r"^task\.aliases: nowhere is not a readable"):
        read(tmp_path, aliases="nowhere")


def test_what_s_means_is_stated():
    table = of_rows([["a"], ["a"], ["rating:safe"], ["a"]], ["s", "Safe", None, "g"])
    with refuses(r"^task\.rating_s: null"):
        map_tags(table, vocabulary("a"), NO_RULES)
    for meaning, column in (("general", 0), ("sensitive", 1)):
        found = map_tags(table, vocabulary("a"), TagRules(meaning, {}, {}, "task."))
        assert rows_of(found) == [[column, 4], [column, 4], [column], [0, 4]]
    assert rows_of(map_tags(table, vocabulary("a", ratings=False), NO_RULES)) == [[0], [0], [], [0]]


# The index.


def test_the_index_is_made_once_and_mapped(tmp_path):
    rows = [{"path": "a", "tags": ["x", "y"], "rating": "e"}, {"path": "b", "tags": ["z"]}]
    collection, known = collection_of(tmp_path / "root", rows), vocabulary("y", "x")
    index_tags(collection, known, NO_RULES, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat()
    again = index_tags(collection, known, NO_RULES, tmp_path / "cache")
    assert file.stat() == before and (again.ids.dtype, again.tagged.dtype) == (np.int32, bool)
    assert [again.of_row(row).tolist() for row in range(2)] == [[3, 4, 5], []]
    index_tags(collection, vocabulary("x", "y"), NO_RULES, tmp_path / "cache")
    other = index_tags(collection, known, rules_of(tmp_path, "z,x"), tmp_path / "cache")
    assert len([*(tmp_path / "cache").iterdir()]) == 3 and other.of_row(1).tolist() == [5]
    with refuses(r"^data\.root: none of the 2 images of .* has a tag of the voc"):
        index_tags(collection, vocabulary("w"), NO_RULES, tmp_path / "cache")
    file.write_bytes(b"x")  # damaged: it is made again
    assert index_tags(collection, known, NO_RULES, tmp_path / "cache").of_row(0).tolist() == [3, 4, 5]


# Vocabularies.


def wanted(**changes):
    keys = dict.fromkeys(("ignore", "keep", "aliases", "implications", "rating_s"))
    return VocabularyConfig(**{**keys, "min_count": 2, "categories": ["general", "character"], **changes})


def rows_with(counts, first=0):
    """Return manifest rows, of which `counts[tag]` have a tag."""
    rows = [{"path": f"{first + number}", "tags": []} for number in range(max(counts.values()))]
    for tag, count in counts.items():
        for row in rows[:count]:
            row["tags"].append(tag)
    return rows


COUNTS = {"b": 2, "A ": 3, "a": 2, "miku": 2, "character:miku": 3, "artist:x": 4, "rare": 1, "kept": 1, "bad": 4}
COUNTS |= {"c,d": 2, "y" * 300: 4, "rating:q": 1}


def test_a_vocabulary_is_made_in_the_order_of_published_taggers(tmp_path):
    rows = rows_with(COUNTS)
    rows += [{"path": "v", "tags": ["a", "val"], "split": "val"}, {"path": "w", "tags": ["rare"], "weight": 0}]
    collection = collection_of(tmp_path / "root", rows)
    (tmp_path / "ignore.txt").write_text("# comment\n\nBad\ncharacter:a\n")
    (tmp_path / "keep.txt").write_text("kept\n")
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("ignore", "keep")}
    made = make_vocabulary(collection, wanted(**lists), "vocabulary.")
    assert made.names == (*RATINGS, "a", "b", "c,d", "kept", "miku")
    assert made.categories == (9, 9, 9, 9, 0, 0, 0, 0, 4) and made.counts == (0, 0, 1, 0, 3, 2, 2, 1, 3)
    assert made.tag_ids == (*RATINGS.values(), 4, 5, 6, 7, 8)


def test_implied_tags_count_and_other_categories_come_last(tmp_path):
    collection = collection_of(tmp_path / "root", rows_with({"kitty": 3, "cat": 1, "artist:z": 2, "copyright:y": 2}))
    (tmp_path / "aliases.csv").write_text("kitty,cat")
    (tmp_path / "implications.csv").write_text("cat,animal")
    files = {name: str(tmp_path / f"{name}.csv") for name in ("aliases", "implications")}
    chosen = make_vocabulary(collection, wanted(categories=["artist", "general", "copyright"], **files), "vocabulary.")
    assert list(zip(chosen.names, chosen.counts)) == [("animal", 3), ("cat", 3), ("z", 2), ("y", 2)]  # nor ratings


def test_a_vocabulary_without_a_tag_is_refused(tmp_path):
    collection = collection_of(tmp_path / "root", rows_with({"a": 1, "b": 3}))
    with refuses(r"^vocabulary\.min_count: no tag of general, character is on 4 .*'b' on 3, 'a'"):
        make_vocabulary(collection, wanted(min_count=4), "vocabulary.")
    with refuses(r"^vocabulary\.ignore: nowhere is not a readable"):
        make_vocabulary(collection, wanted(ignore="nowhere"), "vocabulary.")


def test_a_text_is_a_vocabulary_with_a_tag_on_each_line(tmp_path):
    (tmp_path / "tags.txt").write_text("1girl\n\nblue eyes\ncharacter:miku\nrating:safe\n")
    read = read_any_vocabulary(tmp_path / "tags.txt")
    assert read.names == (*RATINGS, "1girl", "blue_eyes", "miku") and read.categories == (9, 9, 9, 9, 0, 0, 4)
    assert read.counts == (1, 1, 1, 1, 0, 0, 0) and read.tag_ids == (*RATINGS.values(), 4, 5, 6)
    (tmp_path / "tags.txt").write_text("a\nA")
    with refuses(r"tags\.txt is not a readable vocabulary"):
        read_any_vocabulary(tmp_path / "tags.txt")


JSON = {
    "list": ["1girl", "blue eyes", "character:miku"],
    "entries": [{"tag": "1girl"}, {"tag": "blue_eyes"}, {"tag": "miku", "category": 4}],
    "tag to index": {"blue_eyes": 1, "1girl": 0, "character:miku": 2},
    "index to tag": {"1": "blue_eyes", "0": "1girl", "2": "character:miku"},
    "index to entry": {
        "0": {"tag": "1girl", "category": "General"},
        "1": {"tag": "blue_eyes", "category": 0},
        "2": {"tag": "miku", "category": "character"},
    },
    "tables in a dictionary": {
        "version": 1,
        "tag_to_index": {"<PAD>": 0, "1girl": 1, "blue_eyes": 2, "miku": 3},
        "tag_to_category": {"miku": "Character"},
        "tag_frequencies": {"1girl": 7},
    },
    "tables of camie-tagger": {"dataset_info": {"tag_mapping": {"tags": ["1girl", "blue_eyes", "character:miku"]}}},
}


@pytest.mark.parametrize("form", JSON)
def test_another_taggers_json_is_a_vocabulary(tmp_path, form):
    file = tmp_path / "vocabulary.json"
    file.write_text(json.dumps(JSON[form]))
    read = read_any_vocabulary(file)
    assert (read.names, read.categories) == (("1girl", "blue_eyes", "miku"), (0, 0, 4))
    assert read.counts in ((7, 0, 0), (0, 0, 0)) and ("7" not in file.read_text() or read.counts[0] == 7)


def test_the_four_ratings_of_another_tagger_come_first(tmp_path):
    tags = {"1girl": "Year", **dict.fromkeys(reversed(RATINGS), "Rating")}
    rows = {row: {"tag": tag, "category": tags[tag]} for row, tag in enumerate(tags)}
    (tmp_path / "tags.json").write_text(json.dumps(rows))
    read = read_any_vocabulary(tmp_path / "tags.json")
    assert read.names == (*RATINGS, "1girl") and read.categories == (9, 9, 9, 9, 5)  # a category that is not ours: meta


@pytest.mark.parametrize("content", [{"a": "b"}, {"version": 2, "model": {"width": 7}}, 3, {"a": 0, "b": 2}, [None]])
def test_json_of_an_unknown_form_is_named_as_such(tmp_path, content):
    (tmp_path / "tags.json").write_text(json.dumps(content))
    with refuses(r"tags\.json .*its form is none of these"):
        read_any_vocabulary(tmp_path / "tags.json")


def test_a_vocabulary_keeps_the_rows_of_another_before_its_own(tmp_path):
    collection_of(tmp_path / "photos", rows_with({"b": 1, "a": 2, "c": 1}))
    (tmp_path / "known.json").write_text(json.dumps({"tags": ["c", "x"], "tag_frequencies": {"c": 9, "x": 5}}))
    words = ["job=vocabulary", "data.root=photos", "job.output=tags.csv", "job.min_count=1", "job.append_to=known.json"]
    run("prepare", [*words, "data=image_folder"], tmp_path)
    read = read_any_vocabulary(tmp_path / "tags.csv")
    assert (read.names, read.counts) == (("c", "x", "a", "b"), (9, 5, 2, 1))
