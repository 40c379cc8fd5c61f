"""One table of values goes through every reader, and each gives the same answer."""

import json

import pytest

from tests.data.collection.test_collection import load, put
from tests.data.layouts.test_foreign import write_tar
from tests.data.layouts.test_manifest import write_rows
from tests.support import refuses

# By field: values of one type, and what the table has of each.
VALUES = [
    ("label", {"cat ": "cat", "\xa0cat": "cat", "red\xa0 hat": "red hat", "cafe\u0301": "café", "A&amp;B": "A&B",
               "1.0": "1", "007": "007", "-1": None, "none": "none", " ": None,
               '{"class":"cat"}': "cat"}),
    ("label", {0.0: "0", 1.0: "1", 0.5: "0.5", None: None, 2.0: "2"}),
    ("label", {True: "True", False: "False", None: None}),
    ("label", {3: "3", -1: None, 0: "0"}),
    ("tags", {"red hat, sky ,sky": ["red hat", "sky"], "['red hat', \"sky's\"]": ["red hat", "sky's"],
              '["caf\\u00e9", "b"]': ["café", "b"], "['a' 'b']": ["a", "b"], "[]": [], "[1, 2.0]": ["1", "2"],
              "a，b c": ["a", "b c"], "d&amp;d, &gt;_&lt;, it&#039;s": ["d&d", ">_<", "it's"]}),
    ("tags", {("red hat", "sky\xa0", "sky", ""): ["red hat", "sky"], (): []}),
    ("unknown_tags", {("a,b", "hat "): ["a,b", "hat"], ("character:*",): ["character:*"]}),
    ("caption", {"a cat ": "a cat", "it&#039;s\r\ncafe\u0301 ": "it's\ncafé", "['one', 'two']": "one\ntwo", " ": None}),
    ("caption", {("one\n1", " ", "two"): "one 1\ntwo", ("a",): "a"}),
]  # fmt: skip
NAMES = {"labels.csv": "file", "manifest.csv": "path", "metadata.csv": "file_name"}  # of the column of paths
TYPED = {"manifest.jsonl": "path", "manifest.parquet": "path", "metadata.jsonl": "file_name", "0.parquet": "image"}
OTHERS = ("meta_a.json", "beside json", "tar json")
OF_TEXTS = {"label": ("folder", "tar cls"), "tags": ("beside txt", "tar txt"), "caption": ("beside caption",)}


def write(root, reader, field, values):
    """Write images with a value each, in the form of a reader."""
    paths = [f"{number:02}.png" for number in range(len(values))]
    content = [(put(root, path) / path).read_bytes() for path in paths]
    form, _, ending = reader.partition(" ")
    if reader in ("folder", "0.parquet") or form == "tar":
        [(root / path).unlink() for path in paths]
    if column := (NAMES | TYPED).get(reader):
        write_rows(root / reader, {column: content if column == "image" else paths, field: values})
    elif form == "folder":
        put(root, *(f"{value}/{path}" for value, path in zip(values, paths)))
    elif form == "meta_a.json":
        (root / form).write_text(json.dumps({path: {field: value} for path, value in zip(paths, values)}))
    else:
        texts = [json.dumps({field: value}) if ending == "json" else value for value in values]
        members = {f"{path[:-4]}.{ending}": text.encode() for path, text in zip(paths, texts)}
        if form == "tar":
            write_tar(root / "0.tar", members | dict(zip(paths, content)))
        for name, text in members.items() if form == "beside" else ():
            (root / name).write_bytes(text)


def list_cases():
    for field, table in VALUES:
        kinds = {*map(type, table)}
        names = (*TYPED, *OTHERS, *(() if tuple in kinds else NAMES), *(OF_TEXTS[field] if kinds == {str} else ()))
        yield from (pytest.param(field, table, name, id=f"{field} {min(map(repr, table))} {name}") for name in names)


@pytest.mark.parametrize("field, table, reader", list_cases())
def test_every_reader_gives_the_same_answer(field, table, reader, tmp_path):
    write(tmp_path / "root", reader, field, [[*value] if isinstance(value, tuple) else value for value in table])
    found = load(tmp_path / "root", tmp_path / "cache")
    rows = sorted(found.table.to_pylist(), key=lambda row: row["path"][-6:])
    assert [row[field] for row in rows] == [*table.values()]
    found.refuse_faults(field)


@pytest.mark.parametrize("reader", [*TYPED, *OTHERS])
@pytest.mark.parametrize("field, value", [("label", ["a"]), ("caption", {"a": 1}), ("tags", [{"a": 1}])])
def test_a_value_of_another_type_is_named_with_its_row(field, value, reader, tmp_path):
    write(tmp_path / "root", reader, field, [None, value])
    with refuses(rf"data\..*(row 1|01.json|'01.png').* has the {field} "):
        load(tmp_path / "root", tmp_path / "cache").refuse_faults(field)
