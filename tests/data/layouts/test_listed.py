"""Tables of users: which rows name which files, and what is a label."""

import pytest

from data.collection.concepts import ConceptConfig
from tests.data.collection.test_collection import columns, load, put
from tests.support import refuses


@pytest.fixture
def read(tmp_path):
    """Write images and tables (by name a text), and return the rows as `path split label tags`."""

    def read(images, tables, **choice):
        put(tmp_path / "root", *images.split())
        for name, text in tables.items():
            (tmp_path / "root" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        found = load(tmp_path / "root", tmp_path / "cache", **choice)
        rows = columns(found, "path", "split", "label", "tags")
        return [f"{path} {split} {label or ''} {'+'.join(tags)}".strip() for path, split, label, tags in rows]

    return read


@pytest.mark.parametrize(
    "text, choice",
    [
        ("id,breed\na,x\nb,y\nc,x\nd,y\n", {}),
        ("bild;klasse\nC:\\f\\a.JPG;x\nb.png;y\nc;x\nd;y\n".encode("utf-16"), {}),
        ('note\tName\tSpecies\n"two\nlines"\tp/a.png\tx\n\tb\ty\n\tc\tx\n\td\ty\n', {}),
        ("photo,what\na,x\nb,y\nc,x\nd,y\n", {}),
        ("photo,x,y\na,1.0,0.0\nb,0.0,1.0\nc,1.0,0.0\nd,0.0,1.0\n", {}),
        ("sep=;\nfile;label\na;x\nb;y\n;\nc;x\nd;y\n", {}),
        ("# of 2024, by a tool\nThe labels\n\nfile,label,note\na,x\nb,y,1, and 2\nc,x,\nd,y,,\n", {}),
        ("a,x\nb,y\nc,x\nd,y\n", {}),
        ("file,label,label\na,x,1\nb,y,2\nc,x,1\nd,y,2\n", {}),
        ("file,label,label_name\na,0,x\nb,1,y\nc,0,x\nd,1,y\n", {}),
        ("'file','label'\n'a','x'\n'b','y'\n'c','x'\n'd','y'\n", {}),
        ("file;label\na;x\nb;y\nc;x\nd;y\n".encode("utf-16-le"), {}),
        ("id,size,what,who\na,9,x,m\nb,8,y,n\nc,7,x,n\nd,6,y,m\n", {"columns": {"label": "what"}}),
    ],
)
def test_forms_of_one_table(text, choice, read):
    found = read("images/a.png images/b.png images/c.png images/d.png", {"t.csv": text}, **choice)
    assert found == [f"images/{name}.png train {label}" for name, label in zip("abcd", "xyxy")]


def test_names_in_both_splits_are_those_of_the_tables_split(read):
    tables = {"train.csv": "id,label\n1,x\n2,y\n", "test.csv": "id\n1\n", "sample_submission.csv": "id,label\n1,x\n"}
    assert read("train/1.png train/2.png test/1.png test/3.png", tables) == [
        "test/1.png test", "test/3.png test", "train/1.png train x", "train/2.png train y",
    ]  # fmt: skip


def test_numbers_of_many_values_are_no_label(read):
    rows = [f"{number},{number % 21}" for number in range(63)]
    images = " ".join(f"{number}.png" for number in range(63))
    assert read(images, {"t.csv": "\n".join(["id,age", *rows])})[0] == "0.png train"


@pytest.mark.parametrize(
    "form, wanted", [("id,age", ""), ("id,kind", " x"), ("id,x,y,z", " x"), ("id,p,q", "  p")]
)  # a column of numbers, of labels, of labels that are columns, and of several tags in a text
def test_the_form_of_a_competition_says_what_the_target_is(form, wanted, read):
    rows = [f"{number},{number % 3},{number + 0.5},x,p{' q' * (number % 2)}" for number in range(24)]
    tables = {"train.csv": "\n".join(["id,odd,age,kind,kinds", *rows]), "sample_submission.csv": f"{form}\n"}
    found = read(" ".join(f"train/{number}.png" for number in range(24)), tables)
    assert found[0] == f"train/0.png train{wanted}"


@pytest.mark.parametrize(
    "images, ids",
    [
        ("1.10.png 1.20.png", "1.10 1.20"),  # a column of numbers would make 1.1 of the first
        ("007.png 010.png", "7 10"),
        ("img_1.png img_2.png", "1 2"),
        ("00.png 01.png", "/data/upload/1/ab12cd34-00.png /data/upload/1/ab12cd34-01.png"),
        ("a.png A.png", "a.png A.png"),
    ],
)
def test_ids_as_spreadsheets_and_programs_change_them(images, ids, read):
    first, second = ids.split()
    found = read(images, {"t.csv": f"number,id,label\n1,{first},x\n2,{second},y\n"})
    assert sorted(found) == sorted(f"{path} train {label}" for path, label in zip(images.split(), "xy"))


@pytest.mark.parametrize(
    "column, values, wanted",
    [
        ("is_valid", "True False  1", ["val", "train", "train", "val"]),
        ("split", "TRAINING valid  test", ["train", "val", "train", "test"]),
        ("split", "0 1 2 0", ["train"] * 4),
    ],
)
def test_columns_of_splits(column, values, wanted, read):
    rows = "".join(f"{name}, {value} ,x\n" for name, value in zip("abcd", values.split(" ")))
    found = read("a.png b.png c.png d.png", {"t.csv": f"file,{column},label\n{rows}"})
    assert [row.split()[1] for row in found] == wanted
    if wanted == ["train"] * 4:
        found = read("", {}, splits={"0": "val", "1": "test", "2": "train"})
        assert [row.split()[1] for row in found] == ["val", "test", "train", "val"]


def test_tables_of_each_split_are_read_together(read):
    tables = {f"{split}.csv": f"file,label\n{split}1,x\n{split}2,y\n" for split in ("train", "val", "test")}
    assert read("train1.png train2.png val1.png val2.png test1.png test2.png", tables) == [
        f"{split}{row[0]}.png {split} {row[1]}" for split in ("test", "train", "val") for row in ("1x", "2y")
    ]  # fmt: skip


def test_several_tags_of_an_image(read):
    tables = {"t.csv": "image,labels\na,wet cold\nb,wet\nc,cold\n"}
    assert read("a.png b.png c.png", tables, columns={"tags": "labels"}) == [
        "a.png train  wet+cold", "b.png train  wet", "c.png train  cold",
    ]  # fmt: skip


def test_a_table_of_one_concept_is_not_looked_for_in_another(read, log):
    concepts = [ConceptConfig(path="a"), ConceptConfig(path="b")]
    tables = {"a/notes.csv": "x\n5\n", "b/t.csv": "id,label\n1,x\n2,y\n"}
    assert [row.split()[-1] for row in read("a/1.png b/1.png b/2.png", tables, concepts=concepts)] == [
        "train",
        "x",
        "y",
    ]
    assert "1 tables that nobody has read" in log.text and "cannot be read" not in log.text


def test_columns_of_yes_and_no_are_tags_and_minus_one_is_unknown_beside_0(read, tmp_path, log):
    text = "image,wet,cold\na,1,1\nb,1,-1\nc,{0},{0}\na,{0},1\n"
    for no, unknown in ((0, [None, ["cold"], None]), (-1, None)):
        tables = {"t.csv": text.format(no)}
        assert read("a.png b.png c.png", tables) == ["a.png train  wet+cold", "b.png train  wet", "c.png train"]
        columns = load(tmp_path / "root", tmp_path / "cache").table.to_pydict()
        assert columns.get("unknown_tags") == unknown
    assert "1 rows of t.csv that name an image again: a" in log.text


def test_several_tables_are_named_with_the_key(read):
    with refuses(r"^data\.table: 2 tables name images: a\.csv .*; b\.csv .*data\.table=a\.csv"):
        read("1.png 2.png", {"a.csv": "id,label\n1,x\n2,y\n", "b.csv": "id,label\n1,x\n2,y\n"})


def test_a_table_that_names_nothing_or_is_absent_is_refused(read):
    with refuses(r"^data\.table: no column of .*data\.columns=\{path: NAME\}"):
        read("1.png", {"a.csv": "id,label\nz,x\n"}, table="a.csv")
    with refuses(r"^data\.table: 'b\.csv' is no file"):
        read("1.png", {}, table="b.csv")
