"""One table of values goes through every reader, and each gives the same answer."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.collection.test_collection import load, put
from tests.data.layouts.test_foreign import png, write_tar
from tests.support import refuses

# By field: values of one type, and what the table has of each.
VALUES = [
    ("label", {"cat ": "cat", "\xa0cat": "cat", "red\xa0 hat": "red hat", "cafe\u0301": "café", "A&amp;B": "A&B",
               "1.0": "1", "007": "007", "-1": None, "none": "none", " ": None}),
    ("label", {0.0: "0", 1.0: "1", 0.5: "0.5", None: None, 2.0: "2"}),
    ("label", {True: "True", False: "False", None: None}),
    ("label", {3: "3", -1: None, 0: "0"}),
    ("tags", {"red hat, sky ,sky": ["red hat", "sky"], "['red hat', \"sky's\"]": ["red hat", "sky's"],
              '["caf\\u00e9", "b"]': ["café", "b"], "['a' 'b']": ["a", "b"], "[]": [], "[1, 2.0]": ["1", "2"],
              "a，b c": ["a", "b c"], "d&amp;d, &gt;_&lt;, it&#039;s": ["d&d", ">_<", "it's"]}),
    ("tags", {("red hat", "sky\xa0", "sky", ""): ["red hat", "sky"], (): []}),
    ("caption", {"a cat ": "a cat", "it&#039;s\r\ncafe\u0301 ": "it's\ncafé", "['one', 'two']": "one\ntwo", " ": None}),
    ("caption", {("one\n1", " ", "two"): "one 1\ntwo", ("a",): "a"}),
]  # fmt: skip


def write_csv(file, name, rows):
    text = io.StringIO()
    csv.writer(text).writerows([(name, *rows[0][1]), *((path, *row.values()) for path, row in rows)])
    file.write_text(text.getvalue(), newline="")


def write_lines(file, name, rows):
    file.write_text("".join(json.dumps({name: path, **row}) + "\n" for path, row in rows))


def write_parquet(file, name, rows):
    pq.write_table(pa.Table.from_pylist([{name: path, **row} for path, row in rows]), file)


def write_folders(root, rows):
    for path, row in rows:
        (root / path).unlink()
        put(root, f"{row['label']}/{path}")


def write_beside(root, rows, kind):
    for path, row in rows:
        text = json.dumps(row) if kind == "json" else next(iter(row.values()))
        (root / path).with_suffix(f".{kind}").write_text(text, newline="")


def write_shard(root, rows, kind):
    """Write a tar file or a Parquet file of `datasets` in place of the images."""
    members = {}
    for path, row in rows:
        (root / path).unlink()
        text = json.dumps(row) if kind == "json" else str(*row.values())
        members |= {path: png(1), f"{path[:-4]}.{kind}": text.encode()}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"image": png(1), **row} for _, row in rows]), root / "0.parquet")
    else:
        write_tar(root / "0.tar", members)


TYPED = {
    "manifest.jsonl": lambda root, rows: write_lines(root / "manifest.jsonl", "path", rows),
    "manifest.parquet": lambda root, rows: write_parquet(root / "manifest.parquet", "path", rows),
    "metadata.jsonl": lambda root, rows: write_lines(root / "metadata.jsonl", "file_name", rows),
    "kohya": lambda root, rows: (root / "meta_a.json").write_text(json.dumps(dict(rows))),
    "json": lambda root, rows: write_beside(root, rows, "json"),
    "tar json": lambda root, rows: write_shard(root, rows, "json"),
    "datasets": lambda root, rows: write_shard(root, rows, "parquet"),
}
TEXTS = {
    "labels.csv": lambda root, rows: write_csv(root / "labels.csv", "file", rows),
    "manifest.csv": lambda root, rows: write_csv(root / "manifest.csv", "path", rows),
    "metadata.csv": lambda root, rows: write_csv(root / "metadata.csv", "file_name", rows),
}
OF_ONE_FIELD = {
    "folders": ("label", write_folders),
    "tar cls": ("label", lambda root, rows: write_shard(root, rows, "cls")),
    "txt": ("tags", lambda root, rows: write_beside(root, rows, "txt")),
    "tar txt": ("tags", lambda root, rows: write_shard(root, rows, "txt")),
    "caption": ("caption", lambda root, rows: write_beside(root, rows, "caption")),
}


def list_cases():
    for number, (field, table) in enumerate(VALUES):
        readers = TYPED | (TEXTS if tuple not in map(type, table) else {})
        if all(isinstance(value, str) for value in table):
            readers |= {name: write for name, (own, write) in OF_ONE_FIELD.items() if own == field}
        yield from (pytest.param(field, table, write, id=f"{number} {name}") for name, write in readers.items())


@pytest.mark.parametrize(("field", "table", "write"), list_cases())
def test_every_reader_gives_the_same_answer(field, table, write, tmp_path):
    values = [[*value] if isinstance(value, tuple) else value for value in table]
    rows = [(f"{number:02}.png", {field: value}) for number, value in enumerate(values)]
    root = put(tmp_path / "root", *(path for path, _ in rows))
    write(root, rows)
    found = load(root, tmp_path / "cache")
    in_order = sorted(found.table.to_pylist(), key=lambda row: row["path"][-6:])
    assert [row[field] for row in in_order] == [*table.values()]
    found.refuse_faults(field)


NESTED = {"label": [["a", "b"]], "caption": [{"a": 1}], "tags": [[{"a": 1}]]}


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("field", NESTED)
def test_a_value_of_another_type_is_named_with_its_row(field, name, tmp_path):
    root = put(tmp_path / "root", "0.png", "1.png")
    TYPED[name](root, [("0.png", {field: None}), ("1.png", {field: NESTED[field][0]})])
    with refuses(rf"data\..*(row 1|1.json|'1.png').* has the {field} "):
        load(root, tmp_path / "cache").refuse_faults(field)


def test_numbers_of_classes_have_the_names_of_the_schema(tmp_path):
    feature = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    for number, (kind, values) in enumerate({"one": [1, -1], "list": [[1, 0], []]}.items()):
        features = {"label": feature} if kind == "one" else {"tags": {"feature": feature, "_type": "Sequence"}}
        table = pa.table({"image": [png(1)] * 2, next(iter(features)): values})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (root := tmp_path / str(number)).mkdir()
        pq.write_table(table, root / "0.parquet")
        rows = load(root, tmp_path / "cache").table.to_pylist()
        found = [(row["label"], row["tags"]) for row in rows]
        assert found == ([("dog", []), (None, [])] if kind == "one" else [(None, ["dog", "cat"]), (None, [])])
