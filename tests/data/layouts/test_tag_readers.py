"""Readers of tags: literal tables per layout, refusals by file, and files of any content (Hypothesis)."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.layouts.values import FIELDS
from tests.data.collection.test_collection import load, put
from tests.data.layouts.test_manifest import write_rows
from tests.support import placed, refuses, write_manifest
from utils.errors import UserError
from utils.formats.spelling import KAOMOJI, Tag, parse_rating, parse_tag, with_spaces

FUZZ = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def write(root, name, content):
    """Write bytes, a text, or anything else as JSON; return the root."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    placed(root / name).write_bytes(content)
    return root


def rows(root):
    found = load(root, root / ".cache").table.to_pylist()
    return {row["path"]: (row["tags"], row["rating"], row["caption"], row.get("id")) for row in found}


def refused(root, *parts):
    with refuses(r"^data\.root: ", *parts):
        load(root, root / ".cache")


# Spelling.

SPELLINGS = {
    "Long Hair": (None, "long_hair"),
    " hat \\(x\\) ": (None, "hat_(x)"),
    "(:3)": (None, "(:3)"),
    "\0re\u200bd": (None, "red"),
    "oh\\, my": (None, "oh,_my"),
    "(hatsune miku \\(cosplay\\):.5)": (None, "hatsune_miku_(cosplay)"),
    "\\(a:1\\)": (None, "(a:1)"),
    "character:Hatsune Miku": (4, "hatsune_miku"),
    "creator: someone": (1, "someone"),
    "species:Snow Wolf": (0, "snow_wolf"),
    "lore:mother": (5, "mother"),
    "general:meta:x": (0, "meta:x"),
    "rating:safe": (9, "safe"),
    "re:zero": (None, "re:zero"),
    "cafe\u0301\u3000\t x": (None, "caf\u00e9_x"),
    "^ ^": (None, "^_^"),
    " \n": (None, ""),
    "meta:": (5, ""),
}


def test_spelling():
    assert {text: tuple(parse_tag(text)) for text in SPELLINGS} == SPELLINGS


def test_kaomoji_and_ratings():
    assert len(KAOMOJI) == 19 and {parse_tag(name) for name in KAOMOJI} == {Tag(None, name) for name in KAOMOJI}
    assert [with_spaces(name) for name in ("long_hair", ">_<")] == ["long hair", ">_<"]
    texts = ["g", "Rating: General", "1", "sensitive", "2", "q", "E", "s", "rating:safe", "other", ""]
    names = ["general", "general", "sensitive", "sensitive", "questionable", "questionable", "explicit", "s", "safe"]
    assert [parse_rating(text) for text in texts] == [*names, "other", ""]


# Sidecars.

RECORDS = [
    (
        {"id": 7, "tag_string": "1girl b_(c) x,y", "tag_string_general": "1girl", "tag_string_artist": "x,y",
         "rating": "s"},
        (["1girl", "b_(c)", "artist:x,y"], "s", None, 7),
    ),
    (
        {"tag_string_copyright": "a b", "tag_string_meta": "", "tag_string_general": None},
        (["copyright:a", "copyright:b"], None, None, None),
    ),
    (  # gallery-dl: lists, or texts, beside all tags
        {"tags": ["a", "b", "c"], "tags_general": ["a"], "tags_character": ["b"], "tags_artist": "c"},
        (["a", "character:b", "artist:c"], None, None, None),
    ),
    ({"tags": {"artist": ["x"], "general": ["y z"], "lore": "w v"}},
     (["artist:x", "y z", "lore:w", "lore:v"], None, None, None)),
    # our predecessor
    ({"filename": "b.png", "tags": "a b, c", "rating": 1}, (["a b", "c"], "1", None, None)),
    ({"tags": ["a,b", 'c "d"'], "rating": "safe", "id": True}, (["a,b", 'c "d"'], "safe", None, None)),
    ({"tags": [], "id": 2**70}, ([], None, None, None)),
    ({"tags_species": ["wolf"], "tags_general": ["a"], "tags_contributor": "c", "tags_count": 5},  # e621
     (["a", "wolf", "contributor:c"], None, None, None)),
]  # fmt: skip


def test_json_sidecars(tmp_path):
    for number, (record, _) in enumerate(RECORDS):
        write(put(tmp_path, f"{number}.png"), f"{number}.png.json", record)
    assert list(rows(tmp_path).values()) == [row for _, row in RECORDS]


SENTENCE = "A cat sleeps, deeply, on the red mat."
TEXTS = [
    ({"a.png.txt": "creator:b c\nseries:x, y\nrating:safe\n"}, ["creator:b c", "series:x, y", "rating:safe"], None),
    ({"a.png.txt": f"x\n\n{SENTENCE}\n"}, ["x"], SENTENCE),
    ({"a.txt": "one, two\nthree, one"}, ["one", "two", "three"], "one, two\nthree, one"),
    ({"a.txt": "one", "a.caption": "a text, long"}, ["one"], "a text, long"),
    ({"a.TXT": "one", "a.Json": '{"caption": "two"}'}, ["one"], "two"),
    ({"a.txt": "\ufeffone\r\ntw\u00f6".encode("utf-16")}, ["one", "tw\u00f6"], "one\ntw\u00f6"),
    ({"a.txt": "\0 ", "a.json": ""}, [], None),
    ({"a.txt": f"one, two\n{SENTENCE}"}, ["one", "two"], f"one, two\n{SENTENCE}"),
    (
        {"a.txt": "((smile)), [hat], {blue eyes}, <lora:x:1>, :), (o)_(o)"},
        ["smile", "hat", "blue eyes", ":)", "(o)_(o)"],
        "((smile)), [hat], {blue eyes}, <lora:x:1>, :), (o)_(o)",
    ),
    ({"a.txt": " ".join("abcdefghijklm")}, [], " ".join("abcdefghijklm")),
]  # fmt: skip


def test_text_sidecars(tmp_path, log):
    for number, (files, tags, caption) in enumerate(TEXTS):
        for name, text in files.items():
            write(put(tmp_path, f"{number}/a.png"), f"{number}/{name}", text)
        assert rows(tmp_path / str(number)) == {"a.png": (tags, None, caption, None)}, number
    assert "1 texts with sentences among tags" in log.text and "7/a.txt" in log.text


# kohya's metadata.


def test_metadata_of_kohya(tmp_path, log):
    put(tmp_path, "x/a.png", "x/b.png", "x/meta_c.png", "x/d.png")
    entries = {
        "x/a": {"tags": "long hair, hat \\(x\\)", "caption": "a girl", "train_resolution": [2, 2]},
        "C:\\photos\\x\\b.png": {"caption": "one, two\nthree"},
        "/elsewhere/x/gone.png": {"tags": "t"},
    }
    write(write(write(tmp_path, "meta_lat.json", entries), "x/a.txt", "old"), "x/d.txt", "kept")
    assert rows(tmp_path) == {
        "x/a.png": (["long hair", "hat \\(x\\)"], None, "a girl", None),
        "x/b.png": (["one", "two", "three"], None, "one, two\nthree", None),
        "x/d.png": (["kept"], None, "kept", None),
        "x/meta_c.png": ([], None, None, None),
    }
    assert "not used: 1 rows of tables without an image: /elsewhere/x/gone.png in meta_lat.json" in log.text


def test_metadata_lines_and_files_that_only_look_like_it(tmp_path, log):
    put(tmp_path, "a.png", "b.png", "meta_b.png")
    lines = [{"image_path": "imgs/a.png", "caption": "1girl, solo"}, {"path": "b.png", "tags": "x, y", "rating": "g"}]
    write(tmp_path, "meta_tags.jsonl", "\n\n".join(map(json.dumps, lines)))
    write(write(tmp_path, "meta_b.json", {"tags": "own"}), "meta_info.json", {"version": 1})
    found = rows(tmp_path)
    assert found["a.png"][0] == ["1girl", "solo"] and found["b.png"][:2] == (["x", "y"], "g")
    assert found["meta_b.png"][0] == ["own"] and "tables that name no image: meta_info.json" in log.text


# Tables of posts.

POSTS = [
    {"id": 4000123, "md5": "ab" * 16, "file_ext": "png", "rating": "g", "tag_string_general": " 1girl  solo ",
     "tag_string_character": "miku", "tag_string_artist": "", "tag_string": "1girl miku solo", "score": {"x": 1}},
    {"id": 17, "md5": "cd" * 16, "rating": "s", "tag_string": "a,b c", "tag_string_general": None},
    {"id": 18, "md5": None, "rating": None, "tag_string": ""},
    {"id": 19, "md5": None, "rating": "q", "tag_string_general": "gone"},
]  # fmt: skip
FOUND = {
    "0123/4000123.png": (["1girl", "character:miku", "solo"], "g", None, 4000123),
    "18.jpg": ([], None, None, 18),
    "cd/" + "cd" * 16 + ".webp": (["a,b", "c"], "s", None, 17),
}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_table_of_posts(tmp_path, form, log):
    write(put(tmp_path, *FOUND, "x/nobody.png"), "18.txt", "not read")
    posts = [*POSTS, POSTS[0]]
    write_rows(tmp_path / f"posts.{form}", {name: [post.get(name) for post in posts] for name in POSTS[0]})
    assert rows(tmp_path) == FOUND
    assert "not used: 1 images without a post" in log.text
    assert "1 sidecars beside posts: 18.txt" in log.text
    write_manifest(tmp_path)
    assert rows(tmp_path) == FOUND


BAD = [
    ({"posts.jsonl": '{"id": 1, "tag_string": "a"}\n{"id": '}, "posts.jsonl', line 2, is broken JSON"),
    ({"posts.jsonl": b'{"id": 1, "tag_string": "\xff"}'}, "posts.jsonl is not a readable"),
    (
        {"posts.jsonl": '{"id": 9, "md5": "ee", "tag_string": "a"}'},
        "posts.jsonl' has one of the 1 images; name images",
    ),
    ({"posts.parquet": "PAR1", "posts.jsonl": ""}, "holds both posts.parquet and posts.jsonl"),
    ({"posts.parquet": "PAR1"}, "posts.parquet is not a readable"),
]


@pytest.mark.parametrize("files, message", BAD)
def test_bad_tables_of_posts_are_refused_by_name(tmp_path, files, message):
    for name, content in files.items():
        write(put(tmp_path, "1.png"), name, content)
    refused(tmp_path, message)


FAULTS = [  # files, the field that cannot be read, words of the fault, and the tags that are read
    ({"1.json": "[" * 100_000, "1.txt": "a"}, "file", "1.json' is broken JSON (", ["a"]),
    ({"1.txt": b"caf\xe9"}, "file", "1.txt' cannot be read ('utf-8'", []),
    ({"1.json": {"tags": {"blue": 0.9}, "rating": "g"}, "1.txt": "a"}, "tags", "1.json' has the tags {'blue'", ["a"]),
    ({"1.json": {"tags": ["a"], "rating": 4.5}}, "rating", "1.json' has the rating 4.5", ["a"]),
    ({"meta_a.json": {"1": {"tags": {"x": 5}}}}, "tags", "meta_a.json', '1' has the tags {'x'", []),
    ({"meta_a.jsonl": '{"path": "1"}\n{', "1.txt": "a"}, "file", "meta_a.jsonl', line 2, is broken JSON", ["a"]),
    ({"meta_a.json": {"a": {}}, "meta_b.json": {"a": {}}}, "file", "holds both meta_a.json and meta_b.json", []),
    ({"posts.jsonl": {"id": 1, "tag_string": "a", "rating": 7}}, "rating", "line 1, has the rating 7", ["a"]),
]  # fmt: skip


@pytest.mark.parametrize("files, field, message, tags", FAULTS)
def test_a_bad_sidecar_stops_only_who_reads_the_field(tmp_path, files, field, message, tags, log):
    for name, content in files.items():
        write(put(tmp_path, "1.png"), name, content)
    collection = load(tmp_path, tmp_path / ".cache")
    assert list(collection.row(0).tags) == tags and message in log.text
    if field != "file":
        collection.refuse_faults(*{*FIELDS} - {field})
    with refuses(r"^data\.on_bad_sidecar: stop, and 1 ", message):
        collection.refuse_faults("tags" if field == "file" else field)
    with refuses(r"^data\.on_bad_sidecar: "):
        write_manifest(tmp_path)
    write_manifest(tmp_path, on_bad_sidecar="skip")
    load(tmp_path, tmp_path / ".cache").refuse_faults("tags", "rating", "caption")


def test_files_of_other_programs_are_named_and_not_read(tmp_path, log):
    for number, content in enumerate(([{"box": [0]}], {"shapes": []}, 5)):
        write(put(tmp_path, f"{number}.png"), f"{number}.json", content)
    load(tmp_path, tmp_path / ".cache").refuse_faults("tags", "rating", "caption")
    assert "3 JSON files without tags, rating, caption, label or id: " in log.text


# Anything.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("x" * 10_000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["tags", "tag_string", "tag_string_artist", "tags_meta", "rating", "caption", "id", "md5"])
JSON = st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=5).map(json.dumps).map(str.encode)
CONTENT = st.binary(max_size=60) | JSON | JSON.map(lambda text: b"[" + text + b"]")
NAMES = ("a.json", "a.png.txt", "a.txt", "a.caption", "meta_x.json", "meta_x.jsonl", "posts.jsonl")


@FUZZ
@given(st.dictionaries(st.sampled_from(NAMES), CONTENT, min_size=1, max_size=2))
def test_any_content_is_read_or_refused_by_the_name_of_its_file(files):
    root = Path(tempfile.mkdtemp())
    try:
        for name, content in files.items():
            write(put(root, "a.png"), name, content)
        assert set(rows(root)) == {"a.png"}
    except UserError as error:
        assert str(error).startswith("data.root: ") and any(name in str(error) for name in files), error
    finally:
        shutil.rmtree(root)
