"""The collection of emoji, made of packages of one emoji or two; the seconds of a step; and what the bench lacks."""

import io
import json
import sys
import tarfile

import pytest

from bench import emoji_tags
from bench.emoji_tags import KEYWORDS, PACKAGES, Bench, Packages

NAMES = {"1f355": "pizza", "2764-fe0f": "red-heart", "1f1ef-1f1f5": "flag-japan", "1f9b0": "red-hair"}
DATA = [
    {"hexcode": "1F355", "group": 0, "subgroup": 1, "tags": ["cheese", "slice"]},
    {"hexcode": "2764", "group": 1, "subgroup": 0},
    {"hexcode": "1F1EF-1F1F5", "group": 2, "subgroup": 0, "tags": ["flag"]},
    {"hexcode": "1F1EF"},
]
TEXTS = {
    "groups": [{"order": order, "key": key} for order, key in enumerate(("food-drink", "symbols", "flags"))],
    "subgroups": [{"order": 0, "key": "heart"}, {"order": 1, "key": "food-prepared"}],
}


@pytest.fixture
def packages(tmp_path):
    """Return packages in which one style has no heart."""
    found = Packages(tmp_path / "packages")
    assert [*found.missing()] == [*PACKAGES.values(), KEYWORDS]
    found.folder.mkdir()
    icons = {name: {"body": name} for name in NAMES.values()}
    some = {"pizza": {"body": "pizza", "width": 40}}
    files = {PACKAGES[style]: {"icons": {"width": 36, "height": 36, "icons": icons}} for style in PACKAGES}
    files[PACKAGES["noto"]] = {"icons": {"width": 36, "height": 36, "icons": some}}
    files[PACKAGES["twemoji"]]["chars"] = NAMES
    files[KEYWORDS] = {"en/data": DATA, "en/messages": TEXTS}
    for package, contents in files.items():
        with tarfile.open(found.path(package), "w:gz") as archive:
            for name, content in contents.items():
                entry, text = tarfile.TarInfo(f"package/{name}.json"), json.dumps(content).encode()
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
    assert found.missing() == []
    return found


def test_the_collection_has_the_emoji_of_each_style_with_their_keywords(packages, tmp_path, monkeypatch):
    assert packages.path(KEYWORDS).name == "emojibase-data-17.0.0.tgz"
    assert packages.path(PACKAGES["noto-v1"]).name == "iconify-json-noto-v1-1.2.5.tgz"
    tags = {"pizza": ["food-drink", "food-prepared", "cheese", "slice"], "red-heart": ["symbols", "heart"]}
    assert packages.tags() == tags
    drawn = []
    monkeypatch.setattr(emoji_tags, "draw", lambda icon: drawn.append(icon) or b"png")
    packages.write_collection(tmp_path / "made", None)
    paths = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*.png")}
    assert len(paths) == 11 and {"train/openmoji/red-heart.png", "val/fluent-emoji-flat/pizza.png"} <= paths
    assert "train/noto/pizza.png" in paths and "train/noto/red-heart.png" not in paths
    assert (tmp_path / "made/train/noto/pizza.txt").read_text() == "food-drink, food-prepared, cheese, slice"
    boxes = {tuple(icon[key] for key in ("left", "top", "width", "height")) for icon in drawn}
    assert boxes == {(0, 0, 36, 36), (0, 0, 40, 36)}  # an icon's own size goes before its style's


def test_the_seconds_of_a_step_are_without_start_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "run", lambda self, kind, name, steps, more=(): 7.0 + 0.5 * steps)
    assert Bench(tmp_path, "x", 60.0, quick=False).speed("train") == pytest.approx((7.0, 0.5))


def test_quick_says_which_packages_are_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji_tags, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench/emoji_tags.py", "quick", "packages=none"])
    emoji_tags.main()
    said = capsys.readouterr().out
    assert said.startswith("skipped") and PACKAGES["noto"] in said
