"""IDX files: what is written is what they hold, and what they claim is never believed before it is compared."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from data import idx
from data.idx import FILES, MARKER, encode_idx, idx_to_folders
from tests.in_process import run
from utils.errors import UserError

NAMES = ["ankle boot", "bag", "coat"]
TRAIN_IMAGES, TRAIN_LABELS = FILES["train"]
VAL_IMAGES, VAL_LABELS = FILES["val"]


def make_split(count, seed):
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), draw.integers(0, 3, count - 3)]).astype(np.uint8)
    return draw.integers(0, 256, (count, 5, 4), np.uint8), labels


@pytest.fixture
def source(tmp_path):
    """A folder of 12 training and 6 validation images of 5 x 4 pixels; one file of each split is gzipped."""
    folder = tmp_path / "source"
    folder.mkdir()
    for (split, names), count in zip(FILES.items(), (12, 6)):
        images, labels = make_split(count, seed=len(split))
        (folder / names[0]).write_bytes(encode_idx(images))
        (folder / f"{names[1]}.gz").write_bytes(gzip.compress(encode_idx(labels)))
    return folder


def refused(source, root, names=None):
    with pytest.raises(UserError) as error:
        idx_to_folders(str(source), str(root), names)
    assert not root.exists() and not root.with_name(f".{root.name}.partial").exists()
    return str(error.value)


def test_every_image_is_written_into_the_folder_of_its_class(source, tmp_path):
    root, calls = tmp_path / "deep/er/root", []
    assert idx_to_folders(str(source), str(root), NAMES, lambda *call: calls.append(call)) is True
    for split, count in (("train", 12), ("val", 6)):
        images, labels = make_split(count, seed=len(split))
        assert len(list((root / split).glob("*/*.png"))) == count
        for index, (image, label) in enumerate(zip(images, labels)):
            with Image.open(root / split / NAMES[label] / f"{index:05}.png") as found:
                assert found.mode == "L" and np.array_equal(np.array(found), image)
    assert {path.name for path in root.iterdir()} == {"train", "val", MARKER}


def test_labels_name_the_classes_where_nothing_else_does(source, tmp_path):
    idx_to_folders(str(source), str(tmp_path / "few"), None)
    assert sorted(path.name for path in (tmp_path / "few/train").iterdir()) == ["0", "1", "2"]
    labels = np.arange(12, dtype=np.uint8)
    (source / TRAIN_LABELS).write_bytes(encode_idx(labels))  # a plain file comes before the gzipped one
    idx_to_folders(str(source), str(tmp_path / "many"), None)
    assert sorted(path.name for path in (tmp_path / "many/train").iterdir()) == [f"{label:02}" for label in range(12)]


def test_progress_is_told(source, tmp_path):
    (source / TRAIN_IMAGES).write_bytes(encode_idx(np.zeros((1200, 2, 2), np.uint8)))
    (source / TRAIN_LABELS).write_bytes(encode_idx(np.arange(1200).astype(np.uint8) % 3))
    calls = []
    idx_to_folders(str(source), str(tmp_path / "root"), NAMES, lambda *call: calls.append(call))
    assert calls == [(500, 1206), (1000, 1206)]


def test_a_complete_folder_is_left_alone_and_another_is_refused(source, tmp_path, monkeypatch):
    root = tmp_path / "root"
    idx_to_folders(str(source), str(root), NAMES)
    with monkeypatch.context() as patched:
        patched.setattr(idx, "_write_folders", None)
        assert idx_to_folders(str(source), str(root), NAMES) is False
        made = (root / MARKER).read_text()
        other, foreign = "was made of other files or with other class_names", "is not empty"
        for marker, names, what in ((made, NAMES[::-1], other), ("{", NAMES, foreign), (None, NAMES, foreign)):
            (root / MARKER).unlink() if marker is None else (root / MARKER).write_text(marker)
            with pytest.raises(UserError, match=rf"^data\.root: .*root' {what}, and is left alone; .* new folder"):
                idx_to_folders(str(source), str(root), names)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.root: .*/file/root cannot be written \(Not a directory\); make room"):
        idx_to_folders(str(source), str(tmp_path / "file/root"), NAMES)


def test_images_of_other_files_are_not_kept(source, tmp_path):
    idx_to_folders(str(source), str(tmp_path / "root"), NAMES)
    (source / TRAIN_IMAGES).write_bytes(encode_idx(make_split(12, seed=9)[0]))
    with pytest.raises(UserError, match=r"^data\.root: .*root' was made of other files"):
        idx_to_folders(str(source), str(tmp_path / "root"), NAMES)


def test_a_write_that_failed_leaves_nothing_and_is_done_again(source, tmp_path, monkeypatch):
    root = tmp_path / "root"
    with monkeypatch.context() as patched:
        patched.setattr(idx, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            idx_to_folders(str(source), str(root), NAMES)
    assert not root.exists()
    root.mkdir()  # an empty folder may be there
    assert idx_to_folders(str(source), str(root), NAMES) is True


@pytest.mark.parametrize("name", [name for names in FILES.values() for name in names])
def test_a_missing_file_is_named(name, source, tmp_path):
    for file in (source / name, source / f"{name}.gz"):
        file.unlink(missing_ok=True)
    assert refused(source, tmp_path / "root").startswith(f"source: {str(source)!r} has neither {name} nor {name}.gz; ")


def test_a_folder_that_is_none_is_named(source, tmp_path):
    assert refused(tmp_path / "x", tmp_path / "root").startswith(f"source: '{tmp_path}/x' is not a folder; set source")


IMAGES = np.zeros((3, 2, 2), np.uint8)
GOOD = encode_idx(IMAGES)
WRONG = {
    "empty": b"",
    "labels in the place of images": encode_idx(np.zeros(3, np.uint8)),
    "another type": b"\0\0\x0d" + GOOD[3:],
    "text": b"<!doctype html>",
    "half a header": GOOD[:10],
    "cut off": GOOD[:-1],
    "too long": GOOD + b"x",
    "no images": encode_idx(IMAGES[:0]),
    "4 billion images": GOOD[:4] + b"\xff" * 12 + GOOD[16:],
    "cut off, gzipped": gzip.compress(GOOD[:-1]),
    "a bomb": gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 2**26) + bytes(2**26)),
    "gzip cut off": gzip.compress(GOOD)[:-9],
    "gzip damaged": gzip.compress(GOOD)[:14] + b"\xff" * 20,
    "gzip without a stream": b"\x1f\x8b",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_not_what_it_claims_is_refused(what, source, tmp_path):
    (source / TRAIN_IMAGES).write_bytes(WRONG[what])
    message = refused(source, tmp_path / "root")
    assert message.startswith(f"source: '{source / TRAIN_IMAGES}' is not the IDX file it should be: ")


def test_files_that_do_not_belong_together_are_refused(source, tmp_path):
    (source / VAL_LABELS).write_bytes(encode_idx(np.zeros(5, np.uint8)))
    message = refused(source, tmp_path / "root")
    assert message.startswith(f"source: '{source / VAL_IMAGES}' has 6 images and '{source / VAL_LABELS}' 5 labels; ")


def test_a_label_out_of_range_is_named(source, tmp_path):
    (source / VAL_LABELS).write_bytes(encode_idx(np.array([0, 1, 2, 7, 0, 0], np.uint8)))
    message = refused(source, tmp_path / "root", NAMES)
    assert message.startswith("source: ") and VAL_LABELS in message and "label 7" in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[:2], r"class_names: 2 different names for 3 labels"),
        ([*NAMES, "dress"], r"class_names: 4 different names for 3 labels"),
        (["a", "b", "a"], r"class_names: 2 different names"),
        (["a", "b", "T-shirt/top"], r"class_names: 'T-shirt/top' cannot name a folder; "),
        (["a", "b", ".."], r"class_names: '\.\.' cannot name a folder; "),
        (["a", "b", ""], r"class_names: '' cannot name a folder; "),
        (["a", "b", "c\n"], r"class_names: 'c\\n' cannot name a folder; "),
        (["a", "b", "c" * 300], r"class_names: 'c+' cannot name a folder; "),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message, source, tmp_path):
    with pytest.raises(UserError, match=f"^{message}"):
        idx_to_folders(str(source), str(tmp_path / "root"), names)
    assert not (tmp_path / "root").exists()


def test_the_command(source, tmp_path):
    folders = ["data=image_folder", "data.root=root"]
    overrides = ["job=idx", *folders, f"source={source}", "class_names=[a,b,c]"]
    for _ in range(2):
        assert run("prepare", overrides, tmp_path) == "class folders in root"
    assert len(list((tmp_path / "root/train").glob("[abc]/*.png"))) == 12
    assert run("prepare", ["job=manifest", *folders], tmp_path) == "18 images, 0 unreadable"
    small = ["job=manifest", *folders, "data.max_pixels=19"]
    assert run("prepare", small, tmp_path) == "18 images, 18 unreadable"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["job=idx", "source=x"], r"data: job=idx writes class folders, not glyphs; set data=image_folder data\.root="),
        (["job=idx", "data=image_folder", "data.root=x"], r"source: job=idx needs it; set source to the folder"),
        (["job=glyphs", "source=x"], r"source: 'x' is read by job=idx and undo only, not by job=glyphs; remove source"),
        (
            ["job=manifest", "data=image_folder", "data.root=x", "class_names=[a]"],
            r"class_names: \[a\] is read by job=idx only",
        ),
    ],
)
def test_keys_of_another_job_are_refused(overrides, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}"):
        run("prepare", overrides, tmp_path)
