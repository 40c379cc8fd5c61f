"""Images sorted by class: nothing is moved or overwritten, sidecars go along, and undo.sh takes the copies back."""

import subprocess

import pytest

from data.tools.sorting import sort_rows
from tests.support import placed


def write(root, files):
    for name, text in files.items():
        placed(root / name).write_text(text)


def read(root):
    files = (file for file in sorted(root.rglob("*")) if file.is_file() and file.name != "undo.sh")
    return {str(file.relative_to(root)): file.read_text() for file in files}


NEW = {
    "a/x.jpg": "a picture", "a/x.MOV": "a film", "a/x.jpg.json": "{}", "a/x.png": "another", "a/x2.txt": "of x2",
    "b/x.jpg": "a picture of b", "b/it's -y.jpg": "y", "broken.jpg": "no picture",
}  # fmt: skip


@pytest.mark.parametrize("by", ["copy", "link"])
def test_nothing_is_overwritten_sidecars_go_along_and_it_can_be_undone(by, tmp_path, log):
    write(tmp_path / "new", NEW)
    write(tmp_path / "sorted", {"cat/mine.jpg": "mine", "dog/it's -y.jpg": "of the user"})
    rows = [
        {"path": str(tmp_path / "new/a/x.jpg"), "class": "cat"},
        {"path": str(tmp_path / "new/a/x.png"), "class": "cat", "unsure": True},
        {"path": str(tmp_path / "new/b/x.jpg"), "class": "cat", "unsure": False},
        {"path": str(tmp_path / "new/b/it's -y.jpg"), "class": "../dog"},
        {"path": str(tmp_path / "new/broken.jpg"), "error": "no image"},
    ]
    sort = lambda: list(sort_rows(map(dict, rows), tmp_path / "sorted", by))  # noqa: E731
    places = [row.get("sorted") for row in sort()]
    assert log.messages[-1].endswith("cat 2, unsure 1, _dog 1, unreadable 1") and len(log.messages) == 1
    assert places == [*(str(tmp_path / "sorted" / name) for name in ("cat", "unsure", "cat/2", "_dog")), None]
    expected = {
        "cat/mine.jpg": "mine", "dog/it's -y.jpg": "of the user", "_dog/it's -y.jpg": "y",
        "cat/x.jpg": "a picture", "cat/x.MOV": "a film", "cat/x.jpg.json": "{}", "cat/2/x.jpg": "a picture of b",
        "unsure/x.png": "another", "unsure/x.MOV": "a film", "unsure/x.jpg.json": "{}",
    }  # fmt: skip
    assert read(tmp_path / "sorted") == expected
    assert (tmp_path / "sorted/cat/x.jpg").is_symlink() == (by == "link")
    sort()
    assert "sh undo.sh" in log.messages[1]
    assert read(tmp_path / "sorted") == expected and read(tmp_path / "new") == NEW
    if by == "copy":
        (tmp_path / "sorted/cat/x.jpg.json").write_text("edited")
    subprocess.run(["sh", tmp_path / "sorted/undo.sh"], check=False)
    kept = {"cat/mine.jpg": "mine", "dog/it's -y.jpg": "of the user"}
    assert read(tmp_path / "sorted") == (kept | {"cat/x.jpg.json": "edited"} if by == "copy" else kept)
    assert read(tmp_path / "new") == NEW
