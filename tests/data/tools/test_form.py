"""Predictions in the form of a competition's sample submission."""

import pytest

from data.tools.form import read_form
from data.tools.predictions import list_images
from tests.data.collection.test_collection import put
from tests.support import refuses

FOUND = {"1.png": {"class": "cat", "probs": {"cat": 0.9, "dog": 0.1}}, "a.b.png": {"tags": "cat, dog"}}


@pytest.fixture
def read(tmp_path):
    """Return a function from the text of a form to its filled rows; some images cannot be read."""
    put(tmp_path / "test", "1.png", "a.b.png", "sub/bad.png", "sub/other.png")
    images = list_images(str(tmp_path / "test"), "input").paths

    def read(text, encoding="utf-8"):
        (tmp_path / "form.csv").write_text(text, encoding=encoding)
        form = read_form(tmp_path / "form.csv", images, ["cat", "dog", "hen"])
        rows = form.fill({"path": str(path), **FOUND.get(path.name, {"error": "cut"})} for path in images)
        return form.columns, [[row[name] for name in form.columns] for row in rows]

    return read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_one_column_takes_the_class_or_tags_in_the_order_of_the_form(read, encoding):
    """Ids with or without ending and folder; the row of an unreadable image stays."""
    found = read("image,breed\na.b,cat\nsub/bad,hen\nother.png,cat\n1,dog", encoding)
    rows = [["a.b", "cat, dog"], ["sub/bad", "hen"], ["other.png", "cat"], ["1", "cat"]]
    assert found == (["image", "breed"], rows)


def test_columns_of_names_take_probabilities(read):
    assert read("id,dog,cat\n1,0,0")[1] == [[1, 0.1, 0.9]]


@pytest.mark.parametrize(
    "text, word",
    [("id,label\n1,cat\nnone,cat", "none"), ("id,dog,sheep\n1,0,0", "sheep"), ("", "form.csv"), ("id\n1", "form.csv")],
)
def test_what_cannot_be_filled_is_refused_by_name(read, text, word):
    with refuses(f"^form: .*{word}"):
        read(text)
