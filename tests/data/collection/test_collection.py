"""Collections: literal tables of the folders' layouts, refusals by key and one word, and the index that is kept."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.collection.collection
import data.layouts.table
from data.collection.collection import Collection, check_classes
from data.collection.index import index_collection
from data.layouts.table import SCHEMA, SPLITS, build_table, count_values, hash_table
from data.load import describe_collection
from data.tools.predictions import list_images
from tests.support import placed, refuses


def put(root, *paths, text=None):
    """Write small images, and text files for them; return the root."""
    for number, path in enumerate(paths):
        file = placed(root / path)
        Image.new("L", (4, 4), 10 * number).save(file, format="PNG")
        if text is not None:
            file.with_suffix(".txt").write_text(text, encoding="utf-8")
    return root


def load(root, cache, validation_fraction=0.0, **choice):
    index = index_collection(str(root), validation_fraction=validation_fraction, cache=cache, **choice)
    return Collection(str(root), index)


def columns(collection, *names):
    return [tuple(row) for row in zip(*(collection.table[name].to_pylist() for name in names))]


def listed(collection, *names):
    """Return the values of each row in one text."""
    return [" ".join(map(str, row)) for row in columns(collection, *names)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def opened(tmp_path):
    return lambda root, fraction=0.0: load(root, tmp_path / "cache", fraction)


@pytest.fixture
def refuse(opened, tmp_path):
    def refuse(root, *words):
        with refuses(r"^data\.root: ", *words):
            opened(root)
        assert not (tmp_path / "cache").exists()

    return refuse


# Layouts.


def test_class_folders_with_splits(opened, root):
    put(root, "train/cat/b.png", "train/cat/deep/er/a.png", "train/dog/a.png", "val/cat/a.png", "Valid/dog/a.png")
    collection = opened(root)
    assert listed(collection, "path", "split", "label") == [
        "Valid/dog/a.png val dog",
        "train/cat/b.png train cat",
        "train/cat/deep/er/a.png train cat",
        "train/dog/a.png train dog",
        "val/cat/a.png val cat",
    ]
    assert collection.rows("train").tolist() == [1, 2, 3] and collection.rows("val").dtype == np.int64
    assert collection.absolute_path(4) == root / "val/cat/a.png"
    assert collection.table["size"][1].as_py() == (root / "train/cat/b.png").stat().st_size


def test_backslashes_in_names_are_folders(opened, root, log):
    put(root, r"train\cat\0.png", r"train\dog\0.png", r"val\cat\0.png", r"val\dog\1.png")
    (root / r"train\cat\0.txt").write_text("red")
    found = listed(opened(root), "split", "label", "tags")
    assert found == ["train cat ['red']", "train dog []", "val cat []", "val dog []"]
    assert "4 names with backslashes" in log.text


def test_a_raw_photograph_beside_its_jpeg_is_no_second_image(opened, root, log, monkeypatch):
    monkeypatch.setattr("data.layouts.names.IMAGE_SUFFIXES", (".jpg", ".nef"))
    put(root, "a/1.jpg", "a/1.NEF", "a/2.nef")
    (root / "a/1.txt").write_text("red")
    assert listed(opened(root), "path", "tags") == ["a/1.jpg ['red']", "a/2.nef []"]
    assert "1 raw photographs beside an image of the same name: a/1.NEF" in log.text


def test_class_folders_without_splits_and_flat_folders(opened, root, tmp_path):
    put(root, "cat/a.png", "dog/x/a.png")
    assert listed(opened(root), "path", "split", "label") == ["cat/a.png train cat", "dog/x/a.png train dog"]
    flat = put(tmp_path / "flat", "b.PNG", "a.png", "._a.png", ".trash/b.png")
    (flat / "notes.md").write_text("not an image")
    assert listed(opened(flat), "path", "split", "label") == ["a.png train None", "b.PNG train None"]


def test_masks_and_what_systems_put_beside_pictures_are_no_images(opened, root, log):
    others = "cat/a-masklabel.png cat/A-CondLabel.PNG cat/a.mask.png cat/@eaDir/a.png/T.jpg #recycle/a.png cat/._a.png"
    put(root, "cat/a.png", "dog/b.png", *others.split(), "dog/.thumbs/b.png", "__MACOSX/cat/a.png")
    assert listed(opened(root), "path", "label") == ["cat/a.png cat", "dog/b.png dog"]
    assert "3 masks, which task.mask alone reads, and OneTrainer's conditioning images: cat/A-Cond" in log.text
    assert "4 hidden names, thumbnails, bins and indexes of systems: " in log.text
    assert sorted(path.name for path in list_images(str(root), "input").paths) == ["a.png", "b.png"]
    assert list_images(str(root / "cat/@eaDir"), "input").paths == [root / "cat/@eaDir/a.png/T.jpg"]  # meant


@pytest.mark.parametrize("given", [["train", "test", "valid"], ["train", "test"]])
def test_a_test_split_stays_apart_and_changes_nothing_of_training(given, opened, root):
    put(root, *(f"{name}/{number}.png" for name in given for number in range(3)))
    collection = opened(root, 0.5)
    sides = {split: {os.path.dirname(collection.row(row).path) for row in collection.rows(split)} for split in SPLITS}
    assert sides == {"train": {"train"}, "val": {"valid" if "valid" in given else "train"}, "test": {"test"}}
    assert collection.folder_of(collection.rows("test")) == str(root / "test")
    assert "and 3 test images" in describe_collection(collection)
    (root / "test/0.png").unlink()
    changed = opened(root, 0.5)
    assert changed.seen == collection.seen and changed.fingerprint != collection.fingerprint


def test_links_are_followed_in_a_scanned_folder(opened, root, tmp_path):
    put(tmp_path / "elsewhere", "x.png")
    put(root, "cat/a.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    assert listed(opened(root), "path", "label") == ["cat/a.png cat", "dog/x.png dog"]


@pytest.mark.parametrize(
    "paths, words",
    [
        (["a.png", "b.png", "cat/a.png", "cat/b.png"], ["2 of 4", "class folder"]),
        (["train/cat/a.png", "val/b.png", "val/c.png"], ["class folder", ": val/"]),
        (["train/a.png", "val/b.png", "extra/b.png", "extra/c.png"], ["split folder", ": extra/", "data.splits=false"]),
    ],
)
def test_mixed_layouts_are_refused(refuse, root, paths, words):
    refuse(put(root, *paths), "mixes", *words)


@pytest.mark.parametrize(
    "paths", ["train/c/1.png test/2.png test/3.png", "train/1.png train/4.png test/c/2.png test/3.png"]
)
def test_the_test_split_alone_may_lack_labels(paths, opened, root):
    assert len(opened(put(root, *paths.split()))) == len(paths.split())


def test_a_layout_is_what_nearly_all_images_say(opened, root, log):
    put(root, *(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)), "raw.png")
    assert opened(root).table["label"].to_pylist() == ["cat"] * 3 + ["dog"] * 3 + [None]
    assert "1 images that are not in a class folder or the only ones in it, which have no label: raw.png" in log.text
    put(root, *(f"x{number}.png" for number in range(100)))
    assert {*opened(root).table["label"].to_pylist()} == {None}
    assert "6 images that are not in a class folder or the only ones" in log.text


def test_repeats_of_sd_scripts_are_a_part_of_names(opened, root, log):
    put(root, "1_cat/a.png", "10_dog/a.png")
    assert opened(root).class_names("train") == ["10_dog", "1_cat"] and "2 numbers of folders" in log.text


@pytest.mark.parametrize(
    "paths, ids",
    [
        (["0123/4000123.png", "0999/17999.png"], [4000123, 17999]),
        (["train/23/4000123.png", "train/99/17999.png"], [4000123, 17999]),
        (["ab/ab" + "0" * 30 + ".png", "cd/cd" + "1" * 30 + ".png"], None),
        (["00000/000000012.png", "00001/000010003.png"], None),
        (["cat/1.png", "dog/2.png"], [7, 8]),  # by their sidecars
    ],
)
def test_folders_of_posts_are_no_classes(opened, root, log, paths, ids):
    for number, path in enumerate(paths):
        put(root, path)
        if "cat" in paths[0]:
            (root / path).with_suffix(".json").write_text(f'{{"id": {7 + number}, "tag_string": "a"}}')
    collection = opened(root)
    assert collection.table["label"].to_pylist() == [None, None] and "are no classes" in log.text
    assert ids is None or collection.column("id").tolist() == ids


def test_roots_that_are_none(refuse, root, tmp_path):
    refuse(tmp_path / "absent", str(tmp_path / "absent"), "does not exist")
    refuse("", "''")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "Not a directory")
    (root / "a.mov").write_text("")
    refuse(root, "no image", ".png")


# Sidecars. Their content is in test_tag_readers.py.


def test_sidecars_with_the_whole_name_come_first(opened, root):
    put(root, "a.png", "a.jpg", text="stem")
    (root / "a.png.txt").write_text("whole")
    assert columns(opened(root), "caption") == [("stem",), ("whole",)]


@pytest.mark.parametrize("ending", [".txt", ".png.txt", ".json"])
def test_a_sidecar_may_not_be_a_link_out_of_the_root(opened, root, tmp_path, ending):
    put(root, "cat/a.png", "cat/b.png")
    secret = tmp_path / f"root_secret{ending}"  # its name begins like the root's
    secret.write_text('{"tags": ["secret"]}')
    link = root / f"cat/a{ending}"
    for target in (secret, f"../../{secret.name}"):
        link.symlink_to(target)
        with refuses(rf"^data\.on_bad_sidecar: .*{link}.* link out of the collection.*{secret}"):
            opened(root).refuse_faults("caption")
        link.unlink()
    (root / f"inside{ending}").write_text('{"tags": ["ours"]}')
    link.symlink_to(f"../inside{ending}")
    assert "ours" in str(opened(root).row(0).tags)


def test_links_to_pairs_of_image_and_sidecar_are_followed(opened, root, tmp_path):
    put(tmp_path / "pool", "x.png", text="one, two")
    for name in ("x.png", "x.txt"):
        (root / name).symlink_to(tmp_path / "pool" / name)
    assert opened(root).row(0).tags == ("one", "two")


def test_sidecars_that_are_no_files_or_too_large_are_refused(opened, root):
    put(root, "a.png")
    sidecar = root / "a.txt"
    for make in (
        lambda: os.mkfifo(sidecar),
        lambda: sidecar.write_bytes(b"") or os.truncate(sidecar, 2**40),
        lambda: sidecar.symlink_to(root / "nowhere.txt"),
    ):
        make()
        with refuses(r"^data\.on_bad_sidecar: .*a\.txt"):
            opened(root).refuse_faults("tags")
        sidecar.unlink()


# The index.


def test_the_index_of_a_folder(opened, root, tmp_path):
    put(root, "cat/a.png", "dog/b.png", text="x, y")
    before = sorted(root.rglob("*"))
    collection = opened(root)
    assert list((tmp_path / "cache").iterdir()) == [collection.arrow] and sorted(root.rglob("*")) == before
    assert collection.table.schema.equals(SCHEMA) and len(collection.fingerprint) == 16
    row = collection.row(np.int64(1))
    assert (row.path, row.label, row.tags, row.rating) == ("dog/b.png", "dog", ("x", "y"), None)
    assert (row.caption, row.weight) == ("x, y", 1.0)
    with pytest.raises(IndexError):
        collection.row(2).path  # noqa: B018
    with pytest.raises(AttributeError, match="not score"):
        row.score  # noqa: B018
    before = collection.arrow.stat()
    assert opened(root).arrow.stat() == before


def test_the_index_of_a_folder_follows_its_groups(root, tmp_path):
    put(root, "1.png", "2.png")
    for groups in ([1, 2], [1, 1]):
        (root / "labels.csv").write_text("image,label,patient\n1,x,{}\n2,y,{}\n".format(*groups))
        collection = load(root, tmp_path / "cache", table="auto", columns={"group": "patient"})
        assert collection.column("group").tolist() == groups


@pytest.mark.parametrize("name", SCHEMA.names)
def test_every_column_is_in_the_hash(name):
    base = {"path": ["a", "b"], "size": [1, 2], "tags": [["x", "y"], []], "label": ["l", None], "weight": [1, 0.5]}
    other = {"path": ["a", "c"], "size": [1, 3], "tags": [["x"], ["y"]], "label": [None, "l"], "weight": [1, 0.25]}
    changed = {**base, name: other.get(name, ["new", None])}
    assert hash_table(build_table(base)) != hash_table(build_table(changed))


def test_the_hash_does_not_see_chunks():
    table = build_table(
        {"path": ["a", "b", "c"], "tags": [["x"], [], ["yy", "z"]], "caption": [None, "é", "f"], "size": [1, None, 3]}
    )
    cut = pa.concat_tables([table.slice(0, 1), table.slice(1, 0), table.slice(1, 2)])
    assert cut["path"].num_chunks > 1 and hash_table(cut) == hash_table(table)
    # A literal, so that no release of pyarrow changes it unseen: a run is resumed only where it is the same.
    assert hash_table(table) == "ea333e738e8eed9e"


def test_a_collection_of_many_chunks(opened, root, monkeypatch):
    put(root, *(f"{name}/{number}.png" for name in "ab" for number in range(5)), text="t")
    whole = opened(root, 0.5)
    rows = whole.table.to_pylist()
    whole.arrow.unlink()
    monkeypatch.setattr(data.layouts.table, "_CHUNK_ROWS", 3)
    cut = opened(root, 0.5)
    assert cut.table["path"].num_chunks == 4 and cut.fingerprint == whole.fingerprint
    assert cut.table.to_pylist() == rows and [cut.row(i).path for i in range(10)] == [row["path"] for row in rows]
    assert np.array_equal(cut.class_ids("ab"), whole.class_ids("ab"))


def test_the_index_of_an_unchanged_manifest_is_not_made_again(opened, root, monkeypatch):
    put(root, "a.png", "b.png")
    (root / "manifest.csv").write_text("path\na.png\n")
    assert len(opened(root)) == 1
    with monkeypatch.context() as patched:
        patched.setattr("data.layouts.manifest.read_listed", lambda *_: pytest.fail("read again"))
        assert len(opened(root)) == 1
    (root / "manifest.csv").write_text("path\na.png\nb.png\n")
    assert len(opened(root)) == 2
    opened(root).arrow.write_bytes(b"damaged")
    assert len(opened(root)) == 2


def test_columns_as_arrays(opened, root):
    paths = [f"{name}.png" for name in "abcdef"]
    columns = {"path": paths, "label": ["x", "y", "x", None, "z", "z"], "split": [None, None, "val", None, None, "val"]}
    columns |= {"weight": [0.5, None, None, None, 0, 0], "tags": [["t", "u"], ["u"], ["u", "v"], None, None, None]}
    pq.write_table(pa.table(columns), put(root, *paths) / "manifest.parquet")
    collection = opened(root)
    ids = collection.class_ids(["y", "x"])
    assert ids.tolist() == [1, 0, 1, -1, -1, -1] and ids.dtype == np.int64
    assert collection.weights().tolist() == [0.5, 1, 1, 1, 0, 0]
    assert [collection.rows(split).tolist() for split in ("train", "val")] == [[0, 1, 3], [2]]
    assert [collection.class_names(split) for split in ("train", "val")] == [["x", "y"], ["x"]]
    assert "without 2 of weight 0" in describe_collection(collection)
    assert list(count_values(collection.table["tags"]).items()) == [("u", 3), ("t", 1), ("v", 1)]


# Classes.


def test_fewer_than_two_classes_are_refused(opened, root):
    with refuses(r"^data\.root: .* has 1 classes .*manifest\.csv"):
        check_classes(opened(put(root, "train/a/a.png")))


def test_classes_that_differ_in_case_alone_are_named(opened, root, log):
    check_classes(opened(put(root, "train/Cat/a.png", "train/cat/b.png", "train/dog/c.png")))
    assert log.text.endswith(": Cat, cat\n")
