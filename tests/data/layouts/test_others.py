"""Files that no reader takes are counted by ending, at the start of every command."""

import pytest

from data.open import load_collection
from data.tools.predictions import find_images
from tests.data.tools.test_duplicates import picture
from tests.in_process import run
from tests.support import data_config, refuses

SAID = "124 files of kinds that no reader takes: .heic 80, .nef 40, .csv 2, no ending 2\n"


@pytest.fixture
def phone(tmp_path):
    """The photographs of a phone: 4 that are read, 120 that are not."""
    for number in range(124):
        kind = "jpg" if number < 4 else "HEIC" if number < 84 else "nef"
        file = tmp_path / f"phone/{'ab'[number % 2]}/{number}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number, (40, 30)).save(file) if number < 4 else file.write_bytes(b"x")
    for name in ("labels.csv", "a/train.csv", "README", "b/README", ".hidden.nef"):
        (tmp_path / "phone" / name).write_text("")
    return tmp_path / "phone"


def start(root, **changes):
    load_collection(data_config(root=str(root), **changes))


def check(root, **changes):
    run("prepare", ["job=check", "data=image_folder", f"data.root={root}"], root.parent)


def write(root, **changes):
    run("prepare", ["job=manifest", "data=image_folder", f"data.root={root}"], root.parent)


@pytest.mark.parametrize("command", [start, check, write])
def test_every_command_warns_of_them_if_they_outnumber_the_images(command, phone, log, monkeypatch):
    monkeypatch.chdir(phone.parent)
    for _ in range(2):
        log.clear()
        command(phone)
        assert f"data.root: not used: {SAID}" in log.text
        assert [record.levelname for record in log.records if "kinds" in record.message][0] == "WARNING"


def test_predict_says_it_too(phone, log):
    assert len(find_images(str(phone), "input").paths) == 4
    assert f"input: not used: {SAID}" in log.text


def test_a_few_are_a_line_and_a_folder_without_an_image_names_them(phone, log, monkeypatch):
    monkeypatch.chdir(phone.parent)
    for file in [*phone.rglob("*.nef"), *phone.rglob("*.HEIC"), *phone.rglob("README")]:
        file.unlink()
    start(phone)
    assert [record.levelname for record in log.records if "kinds" in record.message] == ["INFO"]
    for file in phone.rglob("*.jpg"):
        file.rename(file.with_suffix(".heic"))
    with refuses(r"holds no image \(6 files of kinds .*: \.heic 4, \.csv 2\)"):
        start(phone)
