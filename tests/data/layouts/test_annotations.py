"""Annotation files of other programs: what they say of a class is a label or a tag, and what they say more is named."""

import json

import pytest

from tests.data.collection.test_collection import columns, load, put
from tests.support import placed, refuses, write_manifest

IMAGES = "images/a.png images/b.png images/c.png images/d.png"
LABELS = ["a x", "b y", "c x", "d y"]


@pytest.fixture
def read(tmp_path):
    """Write images and files (by name a text or a value of JSON), and return the rows as `name tags split`."""

    def read(files, images=IMAGES, **choice):
        put(tmp_path / "root", *images.split())
        for name, text in files.items():
            placed(tmp_path / "root" / name).write_text(text if isinstance(text, str) else json.dumps(text))
        rows = columns(load(tmp_path / "root", tmp_path / "cache", **choice), "path", "label", "tags", "split")
        named = [
            (path[-5], "+".join([label] if label else tags), split * (split == "val"))
            for path, label, tags, split in rows
        ]
        return [" ".join(filter(None, each)) for each in named]

    return read


def coco(*classes, **fields):
    """Return a file of COCO, with a mark for each letter: `xy` are two classes of an image."""
    marks = [
        {"image_id": image, "category_id": "xy".index(name), "bbox": [0, 0, 1, 1], **fields}
        for image, names in enumerate(classes)
        for name in names
    ]
    images = [{"id": image, "file_name": f"{name}.png"} for image, name in enumerate("abcd")]
    return {"images": images, "annotations": marks, "categories": [{"id": 0, "name": "x"}, {"id": 1, "name": "y"}]}


def studio(word, **mark):
    mark = {"type": "choices", "value": {"choices": [word]}, **mark}
    return {"annotations": [{"result": [mark]}], "predictions": []}


def voc(*names):
    return f"<annotation>{''.join(f'<object><name>{name}</name><bndbox/></object>' for name in names)}</annotation>"


FORMS = {
    "COCO": {"annotations/instances_default.json": coco(*"xyxy")},
    "FiftyOne": {"labels.json": {"classes": ["x", "y"], "labels": {"a": 0, "b": 1, "c": 0, "d": 1}}},
    "Label Studio": {
        "project.json": [
            {"data": {"image": f"/data/upload/1/ab01cd3{n}-{name}.png"}, **studio(word)}
            for n, (name, word) in enumerate(zip("abcd", "xyxy"))
        ]
    },
    "Label Studio, short": {"min.json": [{"image": f"a/{n}.png", "choice": w} for n, w in zip("abcd", "xyxy")]},
    "Caffe": {"train.txt": "".join(f"images/{n}.png {i % 2}\n" for i, n in enumerate("abcd")), "synsets.txt": "x\ny\n"},
    "VOC": {f"Annotations/{name}.xml": voc(word) for name, word in zip("abcd", "xyxy")},
    "YOLO": {
        "data.yaml": "names: {0: x, 1: y}\n",
        **{f"labels/{n}.txt": f"{i % 2} 0.5 0.5 1 1\n" for i, n in enumerate("abcd")},
    },
    "YOLO beside": {
        "images/classes.txt": "x\ny\n",
        **{f"images/{n}.txt": f"{i % 2} 0.5 0.5 1 1\n" for i, n in enumerate("abcd")},
    },
    "CVAT": {
        "annotations.xml": "<annotations>"
        + "".join(f'<image name="{n}.png"><box label="z"/><tag label="{w}"/></image>' for n, w in zip("abcd", "xyxy"))
        + "</annotations>"
    },
    "Roboflow": {"images/_classes.csv": "filename, x, y\na.png, 1, 0\nb.png, 0, 1\nc.png, 1, 0\nd.png, 0, 1\n"},
    "iCloud": {"Albums/x.csv": "Images\na.png\nc.png\n", "Albums/y.csv": "Images\nb.png\nd.png\n"},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_class_an_image_is_its_label(form, read, log):
    assert read(FORMS[form]) == LABELS
    assert "read as label: 0 of 4 images have several" in log.text and "sidecars without" not in log.text


def test_several_classes_are_tags_and_a_form_beside_is_named(read, log):
    files = {"all.json": coco("xy", "y", "x", ""), "labels.json": {"classes": ["z"], "labels": {"a": 0}}}
    assert read(files) == ["a x+y", "b y", "c x", "d"]
    assert "COCO: boxes are read as tags: 1 of 4 images have several, 1 have none" in log.text
    assert "beside others" in log.text and "labels.json" in log.text


@pytest.mark.parametrize("value", [coco(*"xyxy", segmentation=[[0, 0, 1, 0, 1, 1]]), coco("xx", "yy", "x", "y")])
def test_places_are_named_and_read_where_the_file_is_stated(value, read, log):
    assert read({"marks.json": value}) == ["a", "b", "c", "d"]
    assert "data.table=FILE" in log.text and "marks.json" in log.text
    assert read({}, table="marks.json") == LABELS
    assert read({}, table="none") == ["a", "b", "c", "d"]
    with refuses("data.table: 'other.json'"):
        read({}, table="other.json")


def test_an_annotation_file_that_changes_is_said_beside_a_manifest(read, tmp_path, log):
    read({"all.json": coco(*"xyxy")})
    write_manifest(tmp_path / "root")
    assert read({}) == LABELS and "differ from" not in log.text
    assert read({"all.json": coco(*"yyx")}) == LABELS and "differ from" in log.text


def test_lists_of_splits_and_broken_files(read, log):
    lists = {"train.txt": "a.png 0\nb.png 1\nlost.png 1\n", "val.txt": "c.png 0\nd.png 1\n"}
    expected = ["a x", "b y", "c x val", "d y val"]
    assert (
        read({**lists, "classes.txt": "x\ny", "bad.json": "{", "bad.yaml": "[1", "notes.txt": "two words"}) == expected
    )
    for words in ("bad.json", "bad.yaml", "notes.txt", "lost.png in train.txt"):
        assert words in log.text


def test_folders_of_classes_go_first_and_tags_are_never_boxes(read, log):
    images = "cat/a.png cat/b.png dog/c.png dog/d.png"
    assert read({"marks.json": coco(*"xyxy"), "cat/a.txt": "red, hat"}, images) == ["a cat", "b cat", "c dog", "d dog"]
    assert "beside folders of classes" in log.text


DOGS = "Dogs/1 Dogs/2 Rome/3"
TAKEOUT = {"Takeout/Photos/": "Photos from 2024", "OneDrive_1/": "2023", "": "2024/2024-01-31"}


@pytest.mark.parametrize("around", TAKEOUT)
def test_albums_are_the_classes_and_copies_in_a_year_count_once(around, tmp_path, log):
    root = tmp_path / "root"
    put(root, *(f"{around}{name}.png" for name in DOGS.split()), f"{around}{TAKEOUT[around]}/9.png")
    for name in DOGS.split():
        copy = root / around / TAKEOUT[around] / f"{name[-1]}.png"
        copy.write_bytes((root / f"{around}{name}.png").read_bytes())
    for name, more in {
        "1.png.supplemental-metadata": ', "photoTakenTime": {}',
        "metadata": "",
        "2.png.supplemental-metadata": ', "people": []',
    }.items():
        (root / around / f"Dogs/{name}.json").write_text(f'{{"title": "x"{more}}}')
    found = columns(load(root, tmp_path / "cache"), "path", "label")
    assert {path[-5]: label for path, label in found} == {"1": "Dogs", "2": "Dogs", "3": "Rome", "9": None}
    assert len(found) == 4
    assert "3 copies in folders of years" in log.text and "3 files of Google Photos" in log.text


def test_masks_of_no_image_are_pictures_of_their_class(tmp_path):
    put(tmp_path / "root", "mask/1.mask.png", "face/1.face.png", "face/2.face.png", "face/2.face.mask.png")
    found = columns(load(tmp_path / "root", tmp_path / "cache"), "path", "label")
    assert found == [("face/1.face.png", "face"), ("face/2.face.png", "face"), ("mask/1.mask.png", "mask")]


@pytest.mark.parametrize(
    "names", ["annotations/my_train.json annotations/my_val.json", "train/a.coco.json val/a.coco.json"]
)
def test_a_name_in_two_folders_is_found_by_the_split_or_the_folder_of_its_file(names, read, log):
    images = " ".join(f"{split}/{name}.png" for split in ("train", "val") for name in "abcd")
    labels = [*LABELS, "a y val", "b x val", "c y val", "d x val"]
    assert read(dict(zip(names.split(), [coco(*"xyxy"), coco(*"yxyx")])), images) == labels
    assert "not used" not in log.text
