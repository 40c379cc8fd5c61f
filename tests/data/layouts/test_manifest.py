"""Manifests: three forms of one table, refusals by column, row or path, and what prepare.py writes."""

# ruff: noqa: F811

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.images.measure
import utils.ranks.processes
from data.collection.collection import check_classes
from data.layouts.table import MEASURED, SCHEMA
from data.layouts.walk import find_manifest
from tests.data.collection.test_collection import columns, opened, put, refuse, root  # noqa: F401 (fixtures)
from tests.support import refuses, turned, write_manifest


def jsonl(root, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_rows(file, columns):
    """Write columns as the form that the file's ending names."""
    rows = list(zip(*columns.values()))
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows))
        case ".csv":
            with open(file, "w", newline="") as stream:
                csv.writer(stream).writerows([columns, *rows])
        case ".parquet":
            pq.write_table(pa.table(columns), file)


def parquet(root, **arrays):
    pq.write_table(pa.table(arrays), root / "manifest.parquet")
    return root


def rows(collection):
    return [tuple(row.values()) for row in collection.table.select(SCHEMA.names).drop_columns("sha256").to_pylist()]


def columns_of(collection, name):
    return collection.table[name].to_pylist()


def test_a_jsonl_manifest_wins_over_the_layout(opened, root, log):
    put(root, "one/a.png", "two/b, ü.png", "three/c.png", text="ignored")
    written = [
        {"path": "two/b, ü.png", "split": "validation", "label": "B", "tags": ["t"], "rating": "g", "caption": "C"},
        "",
        {"path": "one/a.png", "label": "A", "weight": 2, "size": 77, "sha256": "ab", "caption": None},
    ]
    collection = opened(jsonl(root, written))
    assert rows(collection) == [
        ("one/a.png", 77, "train", "A", [], None, None, 2.0),
        ("two/b, ü.png", (root / "two/b, ü.png").stat().st_size, "val", "B", ["t"], "g", "C", 1.0),
    ]
    assert columns(collection, "sha256") == [("ab",), (None,)]
    assert "3 sidecars beside a manifest: one/a.txt, three/c.txt, two/b, ü.txt" in log.text


def test_a_parquet_manifest_of_other_types(opened, root):
    put(root, "b.png", "a.png")
    parquet(
        root,
        path=pa.array(["b.png", "a.png"], pa.large_string()),
        label=pa.array([3, 5]).dictionary_encode(),
        tags=pa.array([["t"], None], pa.large_list(pa.large_string())),
        weight=pa.array([1, 0], pa.int64()),
        caption=pa.nulls(2),
    )
    collection = opened(root)
    assert [row[3:] for row in rows(collection)] == [("5", [], None, None, 0.0), ("3", ["t"], None, None, 1.0)]
    (root / "manifest.parquet").unlink()
    lines = [{"path": "a.png", "label": "5", "weight": 0}, {"path": "b.png", "label": "3", "tags": ["t"]}]
    assert opened(jsonl(root, lines)).fingerprint == collection.fingerprint
    (root / "manifest.jsonl").write_text(json.dumps(lines, indent=1))
    assert opened(root).fingerprint == collection.fingerprint


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"path": "a.png"', ["JSON"]),
        ({"label": "x"}, ["row 1", "path is null"]),
        ({"path": "b.png", "weight": float("nan")}, ["row 1", "nan"]),
        ({"path": "b.png", "split": "fold 1"}, ["row 1", "'fold 1'", "validation"]),
        ({"path": "a.png"}, ["'a.png'", "twice"]),
        ({"path": "no/b.png"}, ["1 of 2", ": no/b.png;"]),
        ({"path": "sub"}, ["1 of 2", ": sub;"]),
        ({"path": "/etc/passwd"}, ["'/etc/passwd'", "absolute"]),
        ({"path": "sub/../b.png"}, ["'sub/../b.png'", "is absolute, or"]),
        ({"path": "out.png"}, ["links out", ": out.png;"]),
        ({"path": "away/b.png"}, ["links out", ": away/b.png;"]),
        ({"path": "itself.png"}, ["1 of 2", ": itself.png;"]),
    ],
)
def test_rows_are_refused(refuse, root, tmp_path, row, words):
    put(root, "a.png", "b.png", "sub/b.png")
    put(tmp_path / "root_elsewhere", "b.png")  # its name begins like the root's
    (root / "out.png").symlink_to(tmp_path / "root_elsewhere" / "b.png")
    (root / "away").symlink_to(tmp_path / "root_elsewhere")
    (root / "itself.png").symlink_to("itself.png")
    refuse(jsonl(root, [{"path": "a.png", "split": "train"}, row]), "manifest.jsonl", *words)


def test_links_inside_the_root_are_fine(opened, root):
    put(root, "real/a.png")
    (root / "b.png").symlink_to(root / "real" / "a.png")
    (root / "link").symlink_to(root / "real")
    assert len(opened(jsonl(root, [{"path": "b.png"}, {"path": "link/a.png"}]))) == 2


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "no row"),
        ("a.png,cat\n", "it needs path"),
        ("path,weight\na.png,heavy\n", "heavy"),
        ("path\n", "no row"),
        ('path,label\na.png,x\nb.png,"y\nz\n', "mark in line 3 has no end"),
    ],
)
def test_csv_manifests_are_refused(refuse, root, text, word):
    put(root, "a.png", "b.png")
    (root / "manifest.csv").write_text(text)
    refuse(root, "manifest.csv", word)


def test_broken_and_double_manifests_are_refused(refuse, root):
    put(root, "a.png")
    (root / "manifest.parquet").write_bytes(b"no Parquet")
    refuse(root, str(root / "manifest.parquet"), "not a readable")
    jsonl(root, [{"path": "a.png"}])
    refuse(root, "both manifest.parquet and manifest.jsonl")


# Further columns.


@pytest.mark.parametrize(
    "values, kept",
    [
        (["2024-01-01", "2024-01-02T10:00:00Z"], ["2024-01-01", "2024-01-02T10:00:00Z"]),
        (["007", "12"], ["007", "12"]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        ([True, False], [1, 0]),
        ([3, "x"], ["3", "x"]),
        ([2**70, 1], [str(2**70), "1"]),
        ([None, None], None),
    ],
    ids=str,
)
def test_a_column_that_nobody_asked_for_stops_nothing(values, kept, opened, root, log):
    put(root, "a.png", "b.png")
    labels = {"label": ["2024-01-01", 3], "mode": [{"x": 1}, None], "length": ["4 m", None], "group": [None, "u7"]}
    columns = {"path": ["a.png", "b.png"], "more": values, **labels}
    collection = opened(jsonl(root, [dict(zip(columns, row)) for row in zip(*columns.values())]))
    assert columns_of(collection, "label") == ["2024-01-01", "3"] and columns_of(collection, "group") == [None, 0]
    assert "not used: 2 columns" in log.text and "column 'length'" in log.text
    assert collection.table.to_pydict().get("more") == kept


def test_dates_are_texts_and_bytes_are_named(opened, root):
    columns = {"path": ["a.png"], "taken": pa.array([0], pa.timestamp("s", "UTC")), "place": pa.array([b"\xff"])}
    parquet(put(root, "a.png"), **columns)
    found = opened(root)
    assert columns_of(found, "taken") == ["1970-01-01 00:00:00.000Z"] and "place" not in found.table.column_names


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_further_columns_are_kept_with_their_types(form, opened, root, log):
    put(root, "a.png", "b.png")
    names = {"path": ["a.png", "b.png"], "score": [1, 2.5], "hash": ["f0", None], "width": [9, 8]}
    nested = {"vector": [[0.5, 1.0], [2.0]], "extra": [{"a": 1}, None]}
    write_rows(root / f"manifest.{form}", names if form == "csv" else names | nested)
    collection = opened(root)
    assert collection.column("score").tolist() == [1.0, 2.5] and collection.column("hash").tolist() == ["f0", None]
    assert collection.column("width").dtype == np.int64 and collection.row(1).width == 8
    assert form == "csv" or ("column 'vector'" in log.text and "column 'extra'" in log.text)
    with refuses(r"^data.root: .*'height'.*job=manifest"):
        collection.column("height")


def test_further_columns_are_in_the_fingerprint_unless_they_follow_from_the_files(opened, root):
    plain = opened(jsonl(put(root, "a.png"), [{"path": "a.png"}]))
    measured = opened(jsonl(root, [{"path": "a.png", "width": 3}]))
    scored = opened(jsonl(root, [{"path": "a.png", "width": 3, "score": 1.0}]))
    assert plain.fingerprint == measured.fingerprint != scored.fingerprint
    assert len({found.arrow for found in (plain, measured, scored)}) == 3
    assert measured.column("width").tolist() == [3]


# Writing a manifest.


def test_a_manifest_is_the_folder_with_checksums_and_sizes(opened, root):
    put(root, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/ä, d.png", text="t, u")
    Image.new("RGB", (30, 20)).save(root / "val/dog/e.jpg", exif=turned())
    scanned = opened(root)
    assert write_manifest(root, validation_fraction=0.5, verify=True).num_rows == 5
    collection = opened(root)
    assert rows(collection) == rows(scanned) and collection.fingerprint != scanned.fingerprint  # of the checksums
    assert all(len(digest) == 64 for digest in collection.table["sha256"].to_pylist())
    known = {"width": 20, "height": 30, "mode": "RGB", "orientation": 6, "transparent": 0, "sharpness": 0.0}
    assert {name: collection.column(name).tolist()[3] for name in known} == known and {*known} < {*MEASURED}
    write_manifest(root)  # its own manifest it may write again
    assert opened(root).fingerprint == collection.fingerprint


@pytest.mark.parametrize("parallel", [False, True])
def test_unreadable_images_stay_with_weight_0(opened, root, monkeypatch, parallel):
    monkeypatch.setattr(data.images.measure, "_PARALLEL_FROM", 2 if parallel else 100)
    monkeypatch.setattr(utils.ranks.processes, "count_cores", lambda: 2)
    put(root, "a.png", "b.png", "c.png", "d.png")
    (root / "b.png").write_bytes(b"")
    (root / "d.png").write_bytes((root / "c.png").read_bytes()[:40])
    table = write_manifest(root, verify=True)
    assert table["reason"][1].as_py() == "unreadable: the file is empty (0 bytes)"
    assert table["reason"].is_valid().to_pylist() == [False, True, False, True]
    assert opened(root).weights().tolist() == [1, 0, 1, 0]
    assert "reason" not in write_manifest(root).column_names


def test_a_file_that_ends_its_reader_has_weight_0(opened, root, monkeypatch):
    """tests/utils/test_processes.py kills the processes; here every second file does."""

    def all_but_every_second(inspect, files, fatal, least):
        return [fatal(file) if number % 2 else inspect(file) for number, file in enumerate(files)]

    monkeypatch.setattr(data.images.measure, "map_items", all_but_every_second)
    put(root, "a.png", "b.png", "c.png")
    table = write_manifest(root, verify=True)
    assert "ended the process" in table["reason"][1].as_py() and table["weight"].to_pylist() == [1, 0, 1]
    assert all(len(digest) == 64 for digest in opened(root).table["sha256"].to_pylist())


def test_nobodys_manifest_is_overwritten(root):
    for write in (lambda: jsonl(root, [{"path": "a.png"}]), lambda: parquet(root, path=["a.png"])):
        put(root, "a.png")
        write()
        before = find_manifest(root).read_bytes()
        with refuses(r"^data\.root: .*not overwritten"):
            write_manifest(root)
        assert find_manifest(root).read_bytes() == before
        find_manifest(root).unlink()


def test_columns_have_our_names_and_possible_labels_are_named(opened, root):
    put(root, "a.png", "b.png", "c.png", "d.png")
    (root / "manifest.csv").write_text("filename,labels,text,caption\na.png,x,one,1\nb.png,y,two,2\n")
    assert columns(opened(root), "label", "caption", "text") == [("x", "1", "one"), ("y", "2", "two")]
    paths = ["a.png", "b.png", "c.png", "d.png"]
    write_rows(root / "manifest.csv", {"Filename": paths, "colour": ["red", "blue"] * 2, "age": [1, 2, 3, 3]})
    with refuses(r"^data\.root: .*data\.columns=\{label: NAME\}' takes one of colour \(2 values\)"):
        check_classes(opened(root))
