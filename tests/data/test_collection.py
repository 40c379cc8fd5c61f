"""Collections. Literal tables per layout and sidecar, refusals (each message), round trips through index and pickle."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.collection
import data.facts
import data.table
import utils.ranks.processes
from data.collection import Row, check_classes, index_collection, open_collection
from data.manifest import find_manifest
from data.manifest_writer import write_manifest
from data.table import MEASURED, SCHEMA, assign_validation, build_table, hash_table, replace_column
from utils.errors import UserError


def put(root, *paths, text=None, record=None):
    """Write small images, and sidecars for them; return the root."""
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * number).save(file, format="PNG")
        if text is not None:
            file.with_suffix(".txt").write_text(text, encoding="utf-8")
        if record is not None:
            file.with_suffix(".json").write_text(json.dumps(record))
    return root


def index(root, cache, fraction=0.0):
    return index_collection(str(root), validation_fraction=fraction, cache=cache)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def load(cache):
    def load(root, fraction=0.0):
        return open_collection(str(root), index(root, cache, fraction))

    return load


@pytest.fixture
def refuse(cache):
    def refuse(root, pattern, fraction=0.0):
        with pytest.raises(UserError, match=r"^data\.") as caught:
            index(root, cache, fraction)
        assert pattern in str(caught.value), caught.value
        assert not cache.exists()

    return refuse


@pytest.fixture
def said(log):
    """What the log says so far."""
    return lambda: list(log.messages)


def columns(collection, *names):
    return [tuple(row) for row in zip(*(collection.table[name].to_pylist() for name in names))]


# Layouts.


def test_class_folders_with_splits(load, root):
    put(root, "train/cat/b.png", "train/cat/deep/er/a.png", "train/dog/a.png", "val/cat/a.png", "val/dog/a.png")
    collection = load(root)
    assert columns(collection, "path", "split", "label") == [
        ("train/cat/b.png", "train", "cat"),
        ("train/cat/deep/er/a.png", "train", "cat"),
        ("train/dog/a.png", "train", "dog"),
        ("val/cat/a.png", "val", "cat"),
        ("val/dog/a.png", "val", "dog"),
    ]
    assert collection.rows("train").tolist() == [0, 1, 2] and collection.rows("val").dtype == np.int64
    assert collection.absolute_path(3) == root / "val/cat/a.png"
    assert collection.table["size"][0].as_py() == (root / "train/cat/b.png").stat().st_size


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val"])
def test_names_of_the_validation_split(load, root, name):
    put(root, "train/a.png", f"{name}/b.png")
    assert sorted(columns(load(root), "split", "label")) == [("train", None), ("val", None)]


TEST_SPLIT = [
    (["train", "test", "valid"], "the test split (1 images) is ignored; there is a validation split"),
    (["train", "test"], "the test split (1 images) is used for validation; there is no other"),
]


@pytest.mark.parametrize("is_manifest", [False, True], ids=["folders", "manifest"])
@pytest.mark.parametrize("names, message", TEST_SPLIT, ids=["beside validation", "alone"])
def test_a_test_split_is_ignored_beside_a_validation_split(names, message, is_manifest, load, root, said):
    put(root, *(f"{name}/a.png" for name in names))
    if is_manifest:
        jsonl(root, [{"path": f"{name}/a.png", "split": name} for name in names])
    collection = load(root, 0.5)
    assert dict(columns(collection, "path", "split")) == {"train/a.png": "train", f"{names[-1]}/a.png": "val"}
    assert [text for text in said() if "test split" in text] == [f"data.root: {message}"]


def test_class_folders_without_splits(load, root):
    put(root, "cat/a.png", "dog/x/a.png")
    assert columns(load(root), "path", "split", "label") == [
        ("cat/a.png", "train", "cat"),
        ("dog/x/a.png", "train", "dog"),
    ]


def test_flat_folder(load, root):
    put(root, "b.PNG", "a.png")
    (root / "notes.md").write_text("not an image")
    assert columns(load(root), "path", "split", "label") == [("a.png", "train", None), ("b.PNG", "train", None)]


def test_hidden_files_are_passed_over(load, root):
    put(root, "a.png", "._a.png", ".trash/b.png")
    assert columns(load(root), "path") == [("a.png",)]


def test_names_in_any_script_with_spaces_and_commas(load, root):
    names = ["猫, 白/été 1.png", "猫, 白/x=1&[2].png", "собака/я.png"]
    put(root, *names, text="тег один, 二")
    collection = load(root)
    assert [collection.row(i).path for i in range(3)] == sorted(names)
    assert all(collection.absolute_path(i).is_file() for i in range(3))
    assert collection.row(0).tags == ("тег один", "二")
    assert collection.class_names("train") == ["собака", "猫, 白"]


def test_links_are_followed_in_a_scanned_folder(load, root, tmp_path):
    put(tmp_path / "elsewhere", "x.png")
    put(root, "cat/a.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    assert columns(load(root), "path", "label") == [("cat/a.png", "cat"), ("dog/x.png", "dog")]


@pytest.mark.parametrize(
    "paths,message",
    [
        (["a.png", "cat/b.png"], "'cat/b.png' is in a class folder, 'a.png' is not; move every image into a class"),
        (["train/a.png", "train/cat/b.png"], "mixes layouts: 'train/cat/b.png' is in a class folder, 'train/a.png'"),
        (["train/cat/a.png", "val/b.png"], "'train/cat/a.png' is in a class folder, 'val/b.png' is not"),
        (["train/a.png", "extra/b.png"], "'train/a.png' is in a split folder, 'extra/b.png' is not; move every"),
        (["cat/a.png", "test/b.png"], "'test/b.png' is in a split folder, 'cat/a.png' is not"),
    ],
)
def test_mixed_layouts_are_refused(refuse, root, paths, message):
    refuse(put(root, *paths), message)


def test_folders_without_an_image_are_named_and_ignored(load, root, said):
    put(root, "train/cat/a.png", "val/cat/a.png", "val/dog/deep/b.png")
    for name in ("train/owl/deep", "train/cat/empty", ".hidden"):
        (root / name).mkdir(parents=True)
    (root / "train/owl/b.heic").write_text("")
    assert load(root).class_names("train") == ["cat"]
    assert "2 folders hold no image and are ignored: train/cat/empty/, train/owl/" in said()[0]
    assert said()[1].startswith("nested folders: 1 of 3 images") and len(said()) == 2


# The root.


def test_roots_that_are_none(refuse, root, tmp_path):
    refuse(tmp_path / "absent", f"data.root: {str(tmp_path / 'absent')!r} does not exist (looked from ")
    refuse("", "data.root: '' does not exist")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "is a file, not a folder; set data.root to the folder that holds the images")
    (root / "a.heic").write_text("")
    refuse(root, "holds no image; allowed are .png .jpg .jpeg")


def test_a_folder_without_permission_is_refused(refuse, root, monkeypatch):
    put(root, "cat/a.png", "dog/a.png")
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    refuse(root, f"{str(root / 'dog')!r} cannot be read (Permission denied); give this user the right to list it")


def test_bad_links_and_names_are_refused(refuse, root):
    put(root, "cat/a.png")
    (root / "cat" / "loop").symlink_to(root)
    refuse(root, f"{str(root / 'cat' / 'loop')!r} is a link back to {str(root)!r}, a circle; remove the link")
    (root / "cat" / "loop").unlink()
    (root / "cat" / "b.png").symlink_to(root / "nowhere.png")
    refuse(root, f"{str(root / 'cat' / 'b.png')!r} is a link to nothing; remove it, or restore its target")
    (root / "cat" / "b.png").unlink()
    (root / "cat" / "b.png").symlink_to("b.png")
    refuse(root, f"{str(root / 'cat' / 'b.png')!r} cannot be followed (Too many levels of symbolic links); remove the")
    (root / "cat" / "b.png").unlink()
    os.mkfifo(root / "cat" / "b.png")
    refuse(root, "is neither a file nor a folder")
    (root / "cat" / "b.png").unlink()
    (root / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    refuse(root, r"the file name 'cat/\udcff.png' is not UTF-8; rename the file")


# Validation split.


def test_validation_fraction_is_stable(load, root):
    put(root, *(f"{number:04}.png" for number in range(400)))
    before = load(root, 0.25)
    chosen = {before.row(i).path for i in before.rows("val")}
    assert 70 < len(chosen) < 130
    put(root, *(f"new{number}.png" for number in range(50)))
    after = load(root, 0.25)
    assert {after.row(i).path for i in after.rows("val") if not after.row(i).path.startswith("new")} == chosen
    assert chosen < {row for (row, split) in columns(load(root, 0.5), "path", "split") if split == "val"}
    assert len(load(root).rows("val")) == 0


SIZES = {"a": 1, "b": 2, "c": 5, "d": 10, "e": 25, "f": 34}
SHARES = {  # round(fraction * n), halves up, at least 1 and at most n - 1; none of a single image
    0.01: {"b": 1, "c": 1, "d": 1, "e": 1, "f": 1},
    0.1: {"b": 1, "c": 1, "d": 1, "e": 3, "f": 3},
    0.5: {"b": 1, "c": 3, "d": 5, "e": 13, "f": 17},
    0.95: {"b": 1, "c": 4, "d": 9, "e": 24, "f": 32},
}


def labelled(sizes, unlabelled=0):
    paths = {f"{name}/{number}.png": name for name, count in sizes.items() for number in range(count)}
    paths |= {f"{number:04}.png": None for number in range(unlabelled)}
    return build_table({"path": list(paths), "label": list(paths.values()), "split": ["train"] * len(paths)})


def chosen(table):
    """Return the paths of the validation split."""
    return {path for path, split in zip(table["path"].to_pylist(), table["split"].to_pylist()) if split == "val"}


def lowest(paths):
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())


@pytest.mark.parametrize("fraction", SHARES)
def test_the_validation_split_is_stratified_by_the_lowest_hashes(fraction):
    expected = set()
    for name, count in SHARES[fraction].items():
        expected.update(lowest([f"{name}/{number}.png" for number in range(SIZES[name])])[:count])
    assert chosen(assign_validation(labelled(SIZES), fraction)) == expected
    assert chosen(assign_validation(labelled(dict(reversed(SIZES.items()))), fraction)) == expected


def test_the_choice_is_that_of_the_class_alone_and_an_added_image_moves_at_most_one_other():
    before = chosen(assign_validation(labelled({"x": 30, "y": 7}), 0.25))
    other = chosen(assign_validation(labelled({"x": 30, "z": 300}), 0.25))
    assert {path for path in before if path[0] == "x"} == {path for path in other if path[0] == "x"}
    for count in range(31, 60):
        after = chosen(assign_validation(labelled({"x": count, "y": 7}), 0.25))
        assert len((before ^ after) - {f"x/{count - 1}.png"}) <= 1
        before = after


def test_unlabelled_images_beside_labelled_ones_go_by_their_hash(said):
    alone, beside = (assign_validation(labelled(sizes, 200), 0.25) for sizes in ({}, {"x": 8}))
    assert {path for path in chosen(beside) if "/" not in path} == chosen(alone) and 30 < len(chosen(alone)) < 70
    assert len(chosen(beside)) == len(chosen(alone)) + 2
    count, rule = len(chosen(alone)), "those without a label by a hash of their path"
    assert said() == [
        f"no val/ folder: split off {count} of 200 images (fraction 0.25), {rule}",
        f"no val/ folder: split off {count + 2} of 208 images (fraction 0.25), stratified over 1 class, {rule}",
    ]


def test_the_same_fraction_gives_the_same_index_and_a_given_split_stays(load, root, said):
    put(root, *(f"{name}/{number}.png" for name in "ab" for number in range(10)))
    first, again, other = (load(root, fraction) for fraction in (0.2, 0.2, 0.3))
    assert first.arrow == again.arrow and first.fingerprint != other.fingerprint
    assert said()[0] == "no val/ folder: split off 4 of 20 images (fraction 0.2), stratified over 2 classes"
    given = build_table({"path": ["a", "b"], "label": ["x", "x"], "split": ["train", "val"]})
    assert assign_validation(given, 0.5) is given and assign_validation(labelled({"x": 2}), 0).num_rows == 2
    assert len(said()) == 3
    (root / "val").mkdir()
    load(root, 0.2)
    assert "1 folders hold no image" in said()[3] and said()[4].startswith("no image in val/: split")
    load(jsonl(root, [{"path": f"{name}/1.png", "label": name} for name in "ab"]), 0.2)
    single = (
        "data.root: 2 classes ('a', 'b') with a single image (of weight above 0), which stays in training, so valid"
    )
    assert said()[5].startswith("no row of manifest.jsonl is in split val: split off 0 of 2 images")
    assert said()[6].startswith(single)


def test_images_that_nothing_reads_are_not_split_off(said):
    """Else the only validation image of a class may be one of weight 0."""
    table = labelled({"x": 10}, 30)
    first = lowest(table["path"].to_pylist()[30:])[0]
    weights = [0.0 if path == first or path < "0020" else 1.0 for path in table["path"].to_pylist()]
    split = assign_validation(replace_column(table, "weight", pa.array(weights, pa.float32())), 0.1)
    assert {path for path in chosen(split) if "/" in path} == {lowest(table["path"].to_pylist()[30:])[1]}
    assert not any(path < "0020" for path in chosen(split))
    assert " of 19 images (fraction 0.1), stratified over 1 class, those without" in said()[0]


def test_a_manifest_is_split_after_its_images_are_read(load, root):
    put(root, *(f"x/{number}.png" for number in range(5)))
    (root / lowest([f"x/{number}.png" for number in range(5)])[0]).write_bytes(b"")
    write_manifest(str(root), validation_fraction=0.2, verify=True)
    collection = load(root)
    assert len(collection.rows("val")) == 1 and collection.weights()[collection.rows("val")].tolist() == [1.0]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_validation_fraction_out_of_range(refuse, root, fraction):
    message = f"data.validation_fraction: {fraction} is not allowed; set a number from 0 to below 1"
    refuse(put(root, "a.png"), message, fraction)


# Sidecars.


@pytest.mark.parametrize(
    "text,tags,caption",
    [
        ("1girl, long hair ,1girl,\n", ("1girl", "long hair"), "1girl, long hair ,1girl,"),
        ("\ufeffa cat on a mat\n", ("a cat on a mat",), "a cat on a mat"),
        ("one\ntwo", ("one", "two"), "one\ntwo"),
        (" \n", (), None),
    ],
)
def test_text_sidecars(load, root, text, tags, caption):
    row = load(put(root, "a.png", text=text)).row(0)
    assert (row.tags, row.caption) == (tags, caption)


@pytest.mark.parametrize(
    "record,tags,rating,caption",
    [
        ({"tags": ["a b", "c"], "rating": "s", "caption": "cap"}, ("a b", "c"), "s", "cap"),
        ({"tags": "long_hair  1girl"}, ("long_hair", "1girl"), None, "text, side"),
        ({"tags": "long hair, 1girl"}, ("long hair", "1girl"), None, "text, side"),
        ({"tags": {"general": ["a"], "species": ["b"]}}, ("a", "b"), None, "text, side"),
        ({"tag_string": "a b", "tag_string_general": "a", "rating": None}, ("a", "b"), None, "text, side"),
        ({"tag_string_general": "a", "tag_string_artist": "b"}, ("a", "artist:b"), None, "text, side"),
        ({"tags": [], "id": 5}, (), None, "text, side"),
        ({"rating": "e"}, ("text", "side"), "e", "text, side"),
    ],
)
def test_booru_sidecars(load, root, record, tags, rating, caption):
    row = load(put(root, "a.png", text="text, side", record=record)).row(0)
    assert (row.tags, row.rating, row.caption) == (tags, rating, caption)


def test_sidecars_with_the_whole_name_come_first(load, root):
    put(root, "a.png", "a.jpg", text="stem", record={"rating": "stem"})
    (root / "a.png.txt").write_text("whole")
    (root / "a.png.json").write_text('{"rating": "whole"}')
    collection = load(root)
    assert [(row.caption, row.rating) for row in map(collection.row, range(2))] == [
        ("stem", "stem"),
        ("whole", "whole"),
    ]


@pytest.mark.parametrize(
    "data,message",
    [
        (b'{"tags": [', "a.json' is broken JSON (Expecting value"),
        (b"[1]", "a.json' holds a JSON list; an object"),
        (b'{"tags": 5}', "the tags in '"),
        (b'{"tags": ["a", 5]}', "are ['a', 5]; write a list of texts"),
        (b'{"rating": 5}', "'rating' in '"),
        (b"\xff", "a.json' is not UTF-8"),
        (b'{"caption": "\\ud800"}', "a.json' is broken JSON ("),
        (b"[" * 100_000, "a.json' is broken JSON (nested too deeply)"),
    ],
)
def test_broken_sidecars_are_refused_by_name(refuse, root, data, message):
    put(root, "a.png")
    (root / "a.json").write_bytes(data)
    refuse(root, message)
    refuse(root, str(root / "a.json"))


# The index.


@pytest.mark.parametrize("ending", [".txt", ".png.txt", ".json"])
def test_a_sidecar_may_not_be_a_link_out_of_the_root(load, refuse, root, tmp_path, ending):
    put(root, "cat/a.png", "cat/b.png")
    secret = tmp_path / f"root_secret{ending}"  # its name begins like the root's
    secret.write_text('{"tags": ["secret"]}')
    link = root / f"cat/a{ending}"
    link.symlink_to(secret)
    refuse(root, f"{str(link)!r} is a link out of the collection, to {str(secret)!r}; put the file in its")
    link.unlink()
    link.symlink_to(f"../../{secret.name}")
    refuse(root, "is a link out of the collection")
    link.unlink()
    (root / f"inside{ending}").write_text('{"tags": ["ours"]}')
    link.symlink_to(f"../inside{ending}")
    assert "ours" in str(load(root).row(0).tags)


def test_links_to_pairs_of_image_and_sidecar_are_followed(load, root, tmp_path):
    put(tmp_path / "pool", "x.png", text="one, two")
    for name in ("x.png", "x.txt"):
        (root / name).symlink_to(tmp_path / "pool" / name)
    assert load(root).row(0).tags == ("one", "two")


def test_sidecars_that_are_no_files_or_too_large_are_refused(refuse, root):
    put(root, "a.png")
    os.mkfifo(root / "a.txt")
    refuse(root, "a.txt' is not a file of at most 16,777,216 bytes; remove it")
    (root / "a.txt").unlink()
    with open(root / "a.txt", "wb") as stream:
        stream.truncate(2**40)
    refuse(root, "is not a file of at most 16,777,216 bytes")
    (root / "a.txt").unlink()
    (root / "a.txt").symlink_to(root / "nowhere.txt")
    refuse(root, "a.txt' is not a file")


def test_nothing_of_a_json_sidecar_names_a_file(load, root):
    record = {
        "file": "/etc/passwd",
        "path": "../../x",
        "file_name": "../b.png",
        "file_url": "file:///etc",
        "tags": ["t"],
    }
    put(root, "a.png", record=record)
    row = load(root).row(0)
    assert (row.path, row.tags, row.caption) == ("a.png", ("t",), None)


def test_index_of_a_folder(load, root, cache):
    put(root, "cat/a.png", "dog/b.png", text="x, y")
    collection = load(root)
    assert collection.arrow == cache / f"{collection.fingerprint}.arrow"
    assert list(cache.iterdir()) == [collection.arrow] and len(collection.fingerprint) == 16
    assert collection.table.schema.equals(SCHEMA)
    assert collection.row(1) == Row("dog/b.png", "dog", ("x", "y"), None, "x, y", 1.0)
    assert collection.row(np.int64(1)) == collection.row(1)
    with pytest.raises(IndexError):
        collection.row(2)
    before = collection.arrow.stat()
    assert load(root).arrow.stat() == before


def test_fingerprint_follows_the_content(load, root):
    put(root, "cat/a.png", "dog/b.png", text="x")
    seen = {load(root).fingerprint}
    (root / "cat/a.txt").write_text("y")
    seen.add(load(root).fingerprint)
    (root / "dog").rename(root / "horse")
    seen.add(load(root).fingerprint)
    Image.new("L", (90, 70)).save(root / "cat/a.png")
    seen.add(load(root).fingerprint)
    seen.add(load(root, 0.5).fingerprint)
    (root / "cat/a.txt").write_text("x")
    assert len(seen) >= 4 and load(root).fingerprint not in seen


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
    # A literal, so that no release of pyarrow changes it unseen: every index is named by it.
    assert hash_table(table) == "ea333e738e8eed9e"


def test_a_collection_of_many_chunks(load, root, monkeypatch):
    put(root, *(f"{name}/{number}.png" for name in "ab" for number in range(5)), text="t")
    whole = load(root, 0.5)
    whole.arrow.unlink()
    monkeypatch.setattr(data.table, "_CHUNK_ROWS", 3)
    cut = load(root, 0.5)
    assert cut.table["path"].num_chunks == 4 and cut.fingerprint == whole.fingerprint
    assert [cut.row(i) for i in range(10)] == [whole.row(i) for i in range(10)]
    assert np.array_equal(cut.rows("val"), whole.rows("val")) and cut.tag_counts("val") == whole.tag_counts("val")
    assert np.array_equal(cut.class_ids("ab"), whole.class_ids("ab")) and len(cut.table["weight"]) == 10


def test_a_collection_is_pickled_by_its_paths(load, root):
    collection = load(put(root, "cat/a.png", "dog/b.png"))
    collection.row(0)
    data = pickle.dumps(collection)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy._table is None and copy.row(1) == collection.row(1)
    assert (len(copy), copy.fingerprint) == (2, collection.fingerprint)


def test_a_damaged_index_is_refused(load, root):
    collection = load(put(root, "a.png"))
    collection.arrow.write_bytes(collection.arrow.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"^data\.root: the index '.*' cannot be read \(.*delete it, and it will be made again"
    ):
        open_collection(str(root), collection.arrow)


def test_an_index_inside_a_collection_is_never_read(load, root, cache):
    """It has the right name and the right fingerprint, and names a file outside."""
    collection = load(put(root, "a.png", "b.png"))
    columns = {"path": ["../../etc/passwd", "b.png"], "size": [1, 1], "split": ["train"] * 2}
    forged = build_table(columns).replace_schema_metadata({b"fingerprint": collection.fingerprint.encode()})
    for name in (collection.arrow.name, f"manifest.{collection.arrow.name}"):
        with pa.OSFile(str(root / name), "wb") as sink, pa.ipc.new_file(sink, forged.schema) as writer:
            writer.write_table(forged)
    again = load(root)
    assert again.arrow == collection.arrow and again.arrow.parent == cache
    assert [again.row(index).path for index in range(2)] == ["a.png", "b.png"]


def test_columns_as_arrays(load, root):
    rows = [
        {"path": "a.png", "label": "x", "tags": ["t", "u"], "weight": 0.5},
        {"path": "b.png", "label": "y", "tags": ["u"]},
        {"path": "c.png", "split": "val", "label": "x", "tags": ["u", "v"]},
        {"path": "d.png"},
    ]
    collection = load(jsonl(put(root, "a.png", "b.png", "c.png", "d.png"), rows))
    ids = collection.class_ids(["y", "x"])
    assert ids.tolist() == [1, 0, 1, -1] and ids.dtype == np.int64
    assert collection.class_ids(["y"]).tolist() == [-1, 0, -1, -1]
    assert collection.table["label"].to_pylist() == ["x", "y", "x", None]
    assert collection.class_names("train") == ["x", "y"] and collection.class_names("val") == ["x"]
    assert collection.table["weight"].to_pylist() == [0.5, 1, 1, 1]
    assert list(collection.tag_counts("train").items()) == [("u", 2), ("t", 1)]
    assert collection.tag_counts("val") == {"u": 1, "v": 1}


# Classes.


def classes(load, root, train, val):
    put(root, *(f"train/{name}/a.png" for name in train), *(f"val/{name}/a.png" for name in val))
    return load(root)


def test_check_classes(load, root):
    collection = classes(load, root, "abc", "ab")
    assert check_classes(collection, allow_missing=True) == ["a", "b", "c"]
    message = (
        rf"^data\.root: 1 class \('c'\) of '{root}' without a validation image; add images of it \(each "
        r"class needs one for training and one for validation\), remove it, or set task\.allow_missing_classes=true$"
    )
    with pytest.raises(UserError, match=message):
        check_classes(collection, allow_missing=False)


@pytest.mark.parametrize("allow", [True, False])
def test_a_validation_class_without_training_is_refused(load, root, allow):
    with pytest.raises(UserError, match=r"^data\.root: .*'z'.* validation split only \(in training: a, b\)"):
        check_classes(classes(load, root, "ab", "abz"), allow)


@pytest.mark.parametrize("train,found", [("a", "has the class 'a' alone"), ("", "has no class")])
def test_fewer_than_two_classes_are_refused(load, root, train, found):
    put(root, *[f"train/{name}/x.png" for name in train] or ["x.png"])
    with pytest.raises(UserError, match=rf"^data\.root: .*{found} in its training split; classification needs two"):
        check_classes(load(root), allow_missing=True)


def test_without_any_validation_image_the_fraction_is_named(load, root):
    with pytest.raises(
        UserError, match=r"2 classes .* add a val/ folder .*, or, with two .*, set data\.validation_fraction above 0$"
    ):
        check_classes(classes(load, root, "ab", ""), allow_missing=False)


# Manifests.


def jsonl(root, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def parquet(root, **arrays):
    pq.write_table(pa.table(arrays), root / "manifest.parquet")
    return root


def test_a_jsonl_manifest_wins_over_the_layout(load, root):
    put(root, "one/a.png", "two/b, ü.png", "three/c.png", text="ignored")
    rows = [
        {"path": "two/b, ü.png", "split": "validation", "label": "B", "tags": ["t"], "rating": "g", "caption": "C"},
        "",
        {"path": "one/a.png", "label": "A", "weight": 2, "size": 77, "sha256": "ab", "caption": None},
    ]
    collection = load(jsonl(root, rows))
    assert [collection.row(i) for i in range(len(collection))] == [
        Row("one/a.png", "A", (), None, None, 2.0),
        Row("two/b, ü.png", "B", ("t",), "g", "C", 1.0),
    ]
    assert columns(collection, "size", "sha256", "split") == [
        (77, "ab", "train"),
        ((root / "two/b, ü.png").stat().st_size, None, "val"),
    ]


def test_a_parquet_manifest_of_other_string_types(load, root):
    put(root, "b.png", "a.png")
    parquet(
        root,
        path=pa.array(["b.png", "a.png"], pa.large_string()),
        label=pa.array(["x", "y"]).dictionary_encode(),
        tags=pa.array([["t"], None], pa.large_list(pa.large_string())),
        weight=pa.array([1, 0], pa.int64()),
        caption=pa.nulls(2),
    )
    collection = load(root)
    assert collection.row(0) == Row("a.png", "y", (), None, None, 0.0)
    assert collection.row(1) == Row("b.png", "x", ("t",), None, None, 1.0)
    assert load(root).arrow == collection.arrow


def test_the_same_manifest_in_both_formats_is_the_same_collection(load, root):
    put(root, "b.png", "a.png")
    first = load(jsonl(root, [{"path": "b.png", "label": "x"}, {"path": "a.png", "label": "y", "split": "val"}]))
    (root / "manifest.jsonl").unlink()
    second = load(parquet(root, split=["valid", None], label=["y", "x"], path=["a.png", "b.png"]))
    assert first.fingerprint == second.fingerprint and first.arrow == second.arrow


def test_validation_fraction_of_a_manifest(load, root):
    put(root, *(f"{number}.png" for number in range(40)))
    jsonl(root, [{"path": f"{number}.png"} for number in range(40)])
    assert 2 < len(load(root, 0.25).rows("val")) < 20


@pytest.mark.parametrize("has_manifest", [False, True])
def test_nothing_is_written_into_the_root(load, root, cache, has_manifest):
    put(root, "cat/a.png", text="tag")
    if has_manifest:
        jsonl(root, [{"path": "cat/a.png"}])
    before = sorted(root.rglob("*"))
    assert load(root).arrow.parent == cache and sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "row,message",
    [
        ('{"path": "a.png"', "cannot be read (JSON"),
        ('"a.png"', "cannot be read (JSON"),
        ({"label": "x"}, "row 1: path is null"),
        ({"path": "b.png", "extra": {"a": 1}}, "column 'extra' of "),
        ({"path": "b.png", "extra": ["a"]}, "column 'extra' of "),
        ({"path": "b.png", "label": 3}, "column 'label' of "),
        ({"path": "b.png", "tags": "x y"}, "column 'tags' of "),
        ({"path": "b.png", "size": 1.5}, "column 'size' of "),
        ({"path": "b.png", "weight": True}, "column 'weight' of "),
        ({"path": "b.png", "weight": -1}, "row 1: weight is -1.0"),
        ({"path": "b.png", "weight": float("nan")}, "row 1: weight is nan"),
        ({"path": "b.png", "split": "dev"}, "row 1: split is 'dev'; allowed are train, val, valid, validation, test"),
        ({"path": "a.png"}, "row 1: path 'a.png' is at row 0 already"),
        ({"path": "absent.png"}, "row 1: path 'absent.png' does not exist"),
        ({"path": "no/b.png"}, "row 1: path 'no/b.png' does not exist"),
        ({"path": "sub"}, "row 1: path 'sub' is no file"),
        ({"path": "/etc/passwd"}, "row 1: path '/etc/passwd' is absolute"),
        ({"path": "C:\\b.png"}, "is absolute"),
        ({"path": "sub/../b.png"}, "row 1: path 'sub/../b.png' leads out of the collection, by '..'"),
        ({"path": "./b.png"}, "row 1: path './b.png' is not in normal form (that is 'b.png')"),
        ({"path": ""}, "row 1: path '' is not in normal form"),
        ({"path": "sub\\b.png"}, "with / between folders"),
        ({"path": "out.png"}, "row 1: path 'out.png' is a link out of the collection, to "),
        ({"path": "away/b.png"}, "row 1: path 'away/b.png' lies in a link out of the collection, to "),
        ({"path": "dangling.png"}, "row 1: path 'dangling.png' is no file, or a link to nothing"),
        ({"path": "itself.png"}, "row 1: path 'itself.png' cannot be followed"),
    ],
)
def test_jsonl_manifests_are_refused_by_row(refuse, root, tmp_path, row, message):
    put(root, "a.png", "b.png", "sub/b.png")
    put(tmp_path / "root_elsewhere", "b.png")
    (root / "out.png").symlink_to(tmp_path / "root_elsewhere" / "b.png")
    (root / "away").symlink_to(tmp_path / "root_elsewhere")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "itself.png").symlink_to("itself.png")
    refuse(jsonl(root, [{"path": "a.png"}, row]), message)
    assert not list(root.glob("*.arrow"))


# CSV.


def csv_manifest(root, text):
    (root / "manifest.csv").write_bytes(text.encode("utf-8"))
    return root


def test_a_csv_of_paths_and_labels_is_a_manifest(load, root):
    put(root, "one/a.png", "two/b, ü.png", text="ignored")
    text = (
        'path,label,tags,weight,split,caption\r\n"two/b, ü.png",B,"x, y z,",0.5,val,"two\nlines"\r\none/a.png,A,,,,\r\n'
    )
    collection = load(csv_manifest(root, "\ufeff" + text))
    assert [collection.row(index) for index in range(2)] == [
        Row("one/a.png", "A", (), None, None, 1.0),
        Row("two/b, ü.png", "B", ("x", "y z"), None, "two\nlines", 0.5),
    ]
    assert columns(collection, "split") == [("train",), ("val",)]


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "manifest.csv' cannot be read (Empty CSV file)"),
        ("a.png,cat\n", "has the columns a.png, cat; path must be there"),
        ("path,path\na.png,a.png\n", "has the columns path, path"),
        ("path,label\na.png\n", "Expected 2 columns, got 1"),
        ("path,weight\na.png,heavy\n", "invalid value 'heavy'"),
        ("path,size\na.png,1.5\n", "invalid value '1.5'"),
        ("path,label\n,x\n", "row 0: path is null"),
        ('path\n"a.png\n', "manifest.csv"),
        ("path\n", "has no row"),
        ("path,label\na.png,f\udcfcr\n", "cannot be read ("),  # in another encoding
    ],
)
def test_csv_manifests_are_refused(refuse, root, text, message):
    put(root, "a.png", "b.png")
    (root / "manifest.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(root, message)


@pytest.mark.parametrize("folder", ["", "images/", "train/"])
def test_a_csv_of_any_name_gives_labels_where_folders_do_not(load, root, said, folder):
    put(root, f"{folder}a.png", f"{folder}b.png", f"{folder}c.png")
    (root / "labels.csv").write_text(f"score,label,path\n1,cat,{folder}a.png\n2,dog,{folder}b.png\n", encoding="utf-8")
    (root / "notes.csv").write_text("path,comment\nx,y\n")
    collection = load(root)
    assert columns(collection, "path", "label") == [(f"{folder}a.png", "cat"), (f"{folder}b.png", "dog")]
    assert "data.root: labels.csv is read as the manifest: 2 of 3 images" in said()
    with pytest.raises(UserError, match=r"labels\.csv' was not made from this folder and is not overwritten"):
        write_manifest(str(root), validation_fraction=0, verify=False)


def test_class_folders_and_a_manifest_win_over_a_csv_of_another_name(load, root):
    put(root, "A/a.png", "B/b.png")
    (root / "labels.csv").write_text("path,label\nA/a.png,x\n")
    assert columns(load(root), "label") == [("A",), ("B",)]
    assert columns(load(csv_manifest(root, "path,label\nA/a.png,y\n")), "label") == [("y",)]


def test_two_csv_files_with_labels_and_a_wrong_path_are_refused(refuse, root):
    put(root, "a.png", "b.png")
    for name in ("one.csv", "two.CSV"):
        (root / name).write_text("path,label\na.png,x\n")
    refuse(root, "holds one.csv and two.CSV, each with the columns path and label; join them in one manifest.csv")
    (root / "two.CSV").unlink()
    (root / "one.csv").write_text("path,label\nc.png,x\n")
    refuse(root, "one.csv', row 0: path 'c.png' does not exist")


def test_links_inside_the_root_are_fine_in_a_manifest(load, root):
    put(root, "real/a.png")
    (root / "b.png").symlink_to(root / "real" / "a.png")
    (root / "link").symlink_to(root / "real")
    assert len(load(jsonl(root, [{"path": "b.png"}, {"path": "link/a.png"}]))) == 2


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"file": ["a.png"]}, "manifest.parquet' has the columns file; path must be there, and any of path, size"),
        ({"path": ["a.png"], "x": [["y"]]}, "write numbers, text or lists of fixed length"),
        ({"path": ["a.png"], "label": [3]}, "column 'label' of "),
        ({"path": ["a.png"], "tags": ["x"]}, "is string; write it as list<item: string>"),
        ({"path": ["a.png"], "tags": [["x", None]]}, "holds lists with a null"),
        ({"path": ["a.png"], "tags": [[1]]}, "is list<"),
        ({"path": ["a.png", None]}, "row 1: path is null; name the image or drop the row"),
        ({"path": ["a.png"], "weight": [float("inf")]}, "row 0: weight is inf; write a number from 0 up"),
        ({"path": ["a.png", "../a.png"]}, "row 1: path '../a.png' leads out of the collection"),
        ({"path": pa.array([], pa.string())}, "has no row; name at least one image, or remove the file"),
    ],
)
def test_parquet_manifests_are_refused_by_row(refuse, root, arrays, message):
    put(root, "a.png")
    refuse(parquet(root, **arrays), message)


def test_broken_and_double_manifests_are_refused(refuse, root):
    put(root, "a.png")
    (root / "manifest.parquet").write_bytes(b"no Parquet")
    refuse(root, f"data.root: {str(root / 'manifest.parquet')!r} cannot be read (")
    jsonl(root, [{"path": "a.png"}])
    refuse(root, "holds both manifest.parquet and manifest.jsonl; keep the one that is right")
    (root / "manifest.parquet").unlink()
    (root / "manifest.jsonl").write_text("\n")
    refuse(root, "manifest.jsonl")


# Writing a manifest.


def test_write_manifest_round_trip(load, root):
    put(root, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/ä, d.png", text="t, u")
    scanned = load(root)
    report = write_manifest(str(root), validation_fraction=0.5, verify=True)
    assert (report.path, report.rows, report.unreadable) == (root / "manifest.parquet", 4, [])
    assert report.splits == {"train": 2, "val": 2} and report.classes == {"cat": 2, "dog": 2}
    assert report.tags == {"t": 4, "u": 4}
    collection = load(root)
    assert [collection.row(i) for i in range(4)] == [scanned.row(i) for i in range(4)]
    assert collection.fingerprint != scanned.fingerprint
    assert all(len(digest) == 64 for digest in collection.table["sha256"].to_pylist())
    again = write_manifest(str(root), validation_fraction=0, verify=False)  # its own manifest it may write again
    assert again.rows == 4 and load(root).fingerprint == collection.fingerprint


@pytest.mark.parametrize("parallel", [False, True])
def test_unreadable_images_stay_with_weight_0(load, root, monkeypatch, parallel):
    monkeypatch.setattr(utils.ranks.processes, "PARALLEL_FROM", 2 if parallel else 100)
    monkeypatch.setattr(utils.ranks.processes, "count_cores", lambda: 2)
    put(root, "a.png", "b.png", "c.png", "d.png")
    (root / "b.png").write_bytes(b"")
    (root / "d.png").write_bytes((root / "c.png").read_bytes()[:40])
    report = write_manifest(str(root), validation_fraction=0, verify=True)
    assert [path for path, _ in report.unreadable] == ["b.png", "d.png"]
    assert report.unreadable[0][1] == "the file is empty (0 bytes)"
    assert load(root).table["weight"].to_pylist() == [1, 0, 1, 0]
    assert write_manifest(str(root), validation_fraction=0, verify=False).unreadable == []


def test_a_file_that_ends_its_reader_is_listed_with_weight_0(load, root, monkeypatch):
    """tests/utils/test_processes.py kills the processes; here every second file does."""

    def all_but_every_second(inspect, files, fatal):
        return [fatal(file) if number % 2 else inspect(file) for number, file in enumerate(files)]

    monkeypatch.setattr(data.facts, "map_items", all_but_every_second)
    put(root, "a.png", "b.png", "c.png")
    report = write_manifest(str(root), validation_fraction=0, verify=True)
    assert [path for path, _ in report.unreadable] == ["b.png"] and list(report.kinds.values()) == [1]
    assert report.unreadable[0][1].startswith("reading it ended the process")
    assert load(root).table["weight"].to_pylist() == [1, 0, 1]
    assert all(len(digest) == 64 for digest in load(root).table["sha256"].to_pylist())


@pytest.mark.parametrize(
    "write", [lambda root: jsonl(root, [{"path": "a.png"}]), lambda root: parquet(root, path=["a.png"])]
)
def test_nobodys_manifest_is_overwritten(root, write):
    write(put(root, "a.png"))
    before = find_manifest(root).read_bytes()
    with pytest.raises(UserError, match=r"^data\.root: '.*manifest\..*' was not made from this folder and is not over"):
        write_manifest(str(root), validation_fraction=0, verify=False)
    assert find_manifest(root).read_bytes() == before


def test_a_manifest_is_not_made_of_links_out_of_the_root(root, tmp_path):
    put(tmp_path / "root_elsewhere", "x.png")
    put(root, "cat/a.png")
    (root / "dog").symlink_to(tmp_path / "root_elsewhere")
    with pytest.raises(UserError, match="a manifest cannot name this image: path 'dog/x.png' lies in a link out of"):
        write_manifest(str(root), validation_fraction=0, verify=False)
    assert find_manifest(root) is None


# Further columns.


VECTORS = [[0.5, 1.0], [2.0, -1.0]]


def further(form, root):
    """Write a manifest of two images with further columns."""
    put(root, "a.png", "b.png")
    records = [
        {"path": "a.png", "label": "x", "score": 1, "hash": "f0", "width": 9, "embedding": VECTORS[0]},
        {"path": "b.png", "label": "y", "score": 2.5, "hash": None, "width": 8, "embedding": VECTORS[1]},
    ]
    match form:
        case "jsonl":
            jsonl(root, records)
        case "csv":
            csv_manifest(root, "path,label,score,hash,width\na.png,x,1,f0,9\nb.png,y,2.5,,8\n")
        case "parquet":
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(sum(VECTORS, [])), 2)
            columns = {
                name: [record[name] for record in records] for name in ("path", "label", "score", "hash", "width")
            }
            pq.write_table(pa.table({**columns, "embedding": vectors}), root / "manifest.parquet")
    return root


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_further_columns_are_kept_with_their_types(form, load, root):
    collection = pickle.loads(pickle.dumps(load(further(form, root))))
    assert collection.column("score").tolist() == [1.0, 2.5] and collection.column("hash").tolist() == ["f0", None]
    assert collection.column("width").dtype == np.int64 and collection.view(1).width == 8
    if form != "csv":
        assert collection.column("embedding").tolist() == VECTORS
    with pytest.raises(UserError, match=r"^data.root: .* has no column 'height'; .*prepare.py job=manifest fills it"):
        collection.column("height")


def test_further_columns_are_in_the_fingerprint_unless_they_follow_from_the_files(load, root):
    plain = load(jsonl(put(root, "a.png"), [{"path": "a.png"}]))
    measured = load(jsonl(root, [{"path": "a.png", "width": 3}]))
    scored = load(jsonl(root, [{"path": "a.png", "width": 3, "score": 1.0}]))
    assert plain.fingerprint == measured.fingerprint != scored.fingerprint
    assert len({found.arrow for found in (plain, measured, scored)}) == 3
    assert measured.column("width").tolist() == [3]


def test_a_column_of_several_types_is_refused(refuse, root):
    records = [{"path": "a.png", "score": 1}, {"path": "b.png", "score": "high"}]
    refuse(jsonl(put(root, "a.png", "b.png"), records), "changed from number to string")


def test_prepare_fills_in_the_sizes_of_upright_images(load, root):
    put(root, "x/a.png")
    Image.new("RGB", (30, 20)).save(
        root / "x/b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\x01\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    )
    before = load(root).fingerprint
    write_manifest(str(root), validation_fraction=0.0, verify=True)
    collection = load(root)
    measured = {name: collection.column(name).tolist()[1] for name in MEASURED if name not in ("phash", "group")}
    assert measured == {"width": 20, "height": 30, "mode": "RGB", "orientation": 6, "transparent": 0}
    assert collection.fingerprint != before  # of the checksums


def test_a_manifest_made_again_reads_changed_files_only(root, monkeypatch):
    """After a kill as well: what was found is kept line by line."""
    monkeypatch.setattr(data.facts, "CACHE", root.parent / "facts")
    for name in "abcd":
        put(root, f"x/{name}.png")
    read, inspect = [], data.facts.measure_file

    def count(file, **options):
        read.append(Path(file).stem)
        if read == ["a", "b", "c"]:
            raise KeyboardInterrupt
        return inspect(file, **options)

    monkeypatch.setattr(data.facts, "measure_file", count)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(str(root), validation_fraction=0.0, verify=True)
    (journal,) = (root.parent / "facts").iterdir()
    journal.write_text(journal.read_text() + '["torn')
    write_manifest(str(root), validation_fraction=0.0, verify=True)
    first = pq.read_table(root / "manifest.parquet")
    Image.new("RGB", (7, 9)).save(root / "x/b.png")
    write_manifest(str(root), validation_fraction=0.0, verify=True)
    second = pq.read_table(root / "manifest.parquet")
    assert read == ["a", "b", "c", "c", "d", "b"]
    assert [left == right for left, right in zip(first.to_pylist(), second.to_pylist())] == [True, False, True, True]
    assert second["width"][1].as_py() == 7
    write_manifest(str(root), validation_fraction=0.0, verify=False)  # made otherwise
    assert len(read) == 10


def test_the_index_of_an_unchanged_manifest_is_not_made_again(load, root, monkeypatch):
    put(root, "a.png")
    put(root, "b.png")
    (root / "manifest.jsonl").write_text('{"path": "a.png"}\n')
    assert len(load(root)) == 1
    with monkeypatch.context() as patched:
        patched.setattr(data.collection, "read_manifest", lambda *_: pytest.fail("read again"))
        assert len(load(root)) == 1
    (root / "manifest.jsonl").write_text('{"path": "a.png"}\n{"path": "b.png"}\n')
    assert len(load(root)) == 2
