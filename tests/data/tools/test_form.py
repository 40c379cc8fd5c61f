"""Predictions in the form of a competition's sample submission."""

import pytest

from data.tools.form import read_form
from data.tools.predictions import find_images
from tests.data.collection.test_collection import put
from tests.support import refuses

NAMES = ["cat", "dog"]
PROBS = {"1.png": (0.9, 0.1), "a.b.png": (0.2, 0.8)}


def predicted(given, has_tags):
    """Return what predict.py says of the images; some cannot be read."""
    for path in given.paths:
        row = {"error": "cut"}
        if path.name in PROBS and has_tags:
            row = {"tags": "cat, dog", "probs": {"general": dict(zip(NAMES, PROBS[path.name]))}}
        elif path.name in PROBS:
            top = [{"class": name, "prob": prob} for name, prob in zip(NAMES, PROBS[path.name])]
            row = {**max(top, key=lambda each: each["prob"]), "top": top}
        yield {"path": str(path), **row}


@pytest.fixture
def read(tmp_path):
    """Return a function from the text of a form to its filled rows."""
    put(tmp_path / "test", "1.png", "a.b.png", "sub/bad.png", "sub/other.png")
    given = find_images(str(tmp_path / "test"), "input")

    def read(text, encoding="utf-8", names=NAMES, has_tags=False):
        (tmp_path / "form.csv").write_text(text, encoding=encoding)
        form = read_form(tmp_path / "form.csv", given, names, has_tags=has_tags)
        assert len(form.images.paths) == len(text.splitlines()) - 1
        rows = form.fill(predicted(form.images, has_tags))
        return form.columns, [[row[name] for name in form.columns] for row in rows]

    return read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_one_column_takes_the_class_in_the_order_of_the_form(read, encoding):
    """Ids with or without ending and folder; the row of an unreadable image stays."""
    found = read("image,breed\na.b,cat\nsub/bad,cat\n1.png,cat", encoding)
    assert found == (["image", "breed"], [["a.b", "dog"], ["sub/bad", "cat"], ["1.png", "cat"]])
    assert read("image,breed\nbad.png,cat\n1,cat")[1] == [["bad.png", "cat"], ["1", "cat"]]


def test_columns_of_classes_take_probabilities(read):
    assert read("id,dog,cat\n1,0,0\na.b,0,0")[1] == [["1", 0.1, 0.9], ["a.b", 0.8, 0.2]]
    assert read("id,dog\n1,0.5")[1] == [["1", 0.1]]


def test_tags_are_a_text_or_columns_of_some_tags(read):
    assert read("id,tags\n1,x", has_tags=True)[1] == [["1", "cat, dog"]]
    found = read("id,dog,cat\n1,0,0", names=[*NAMES, "hen"], has_tags=True)
    assert found[1] == [["1", 0.1, 0.9]]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("id,label\n1,cat\nnone,cat", "none"),
        ("id,dog,hen\n1,0,0", "cat, hen"),
        ("id,label\n1,0.5", "label"),
        ("", "form.csv"),
        ("id\n1", "form.csv"),
    ],
)
def test_what_cannot_be_filled_is_refused_by_name(read, text, word):
    with refuses(f"^form: .*{word}"):
        read(text)


def test_numbers_may_be_names_of_classes(read):
    assert read("id,label\n1,0", names=["0", "1"])[1] == [["1", "cat"]]
