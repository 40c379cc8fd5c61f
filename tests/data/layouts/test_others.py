"""Files that no reader takes are counted by ending or named, with what would make them read, by every command."""

import pytest

from data.layouts import names
from data.load import load_collection
from data.tools.predictions import list_images
from tests.data.tools.test_duplicates import picture
from tests.in_process import run
from tests.support import data_config, placed, refuses

pytestmark = pytest.mark.usefixtures("without_formats")
SAID = (
    "120 images whose package is not installed (make install-formats reads them): .heic 80 (pillow-heif), .nef 40 (raw",
    "126 files of kinds that no reader takes: .mov 124, no ending 2",
    "2 tables that nobody has read (data.table=FILE",
    "1 volumes of NIfTI, which are not read (write slices as PNG or DICOM): a/scan.nii.gz",
    "2 archives, which are not looked into (unpack them): b/more.tar.gz, photos.zip",
    "2 annotation files that cannot be read: a/0.xml (no element found: line 1, column 0), instances.json (",
)


@pytest.fixture
def phone(tmp_path):
    """The photographs of a phone: 4 that are read, 120 that are not."""
    for number in range(124):
        kind = "jpg" if number < 4 else "HEIC" if number < 84 else "nef"
        file = placed(tmp_path / f"phone/{'ab'[number % 2]}/{number}.{kind}")
        picture(number, (40, 30)).save(file) if number < 4 else file.write_bytes(b"x")
        file.with_suffix(".MOV").write_bytes(b"x")
        if number < 14:
            file.with_name(f"._{file.name}").write_bytes(b"x")
    for name in (
        "labels.csv",
        "a/train.csv",
        "README",
        "b/README",
        "a/0.xml",
        "photos.zip",
        "a/scan.nii.gz",
        "b/more.tar.gz",
        "instances.json",
    ):
        (tmp_path / "phone" / name).write_text("")
    return tmp_path / "phone"


def start(root, **changes):
    load_collection(data_config(root=str(root), **changes))


def check(root, **changes):
    line = run("prepare", ["job=check", "data=image_folder", f"data.root={root}"], root.parent)
    assert "not installed (make install-formats reads them): 120" in line


def write(root, **changes):
    run("prepare", ["job=manifest", "data=image_folder", f"data.root={root}"], root.parent)


@pytest.mark.parametrize("command", [start, check, write])
def test_every_command_names_them(command, phone, log, monkeypatch):
    monkeypatch.chdir(phone.parent)
    for _ in range(2):
        log.clear()
        command(phone)
        assert [line for line in SAID if f"data.root: not used: {line}" not in log.text] == []


def test_predict_says_it_too(phone, log):
    assert len(list_images(str(phone), "input").paths) == 4
    assert f"input: not used: {SAID[0]}" in log.text


def test_a_folder_without_an_image_names_them(phone):
    for file in phone.rglob("*.jpg"):
        file.unlink()
    with refuses(r"holds no image .*\.heic 80 \(pillow-heif\)"):
        start(phone)


def test_a_package_that_is_installed_later_makes_an_index_anew(phone, log, monkeypatch):
    monkeypatch.chdir(phone.parent)
    (phone / "manifest.csv").write_text("path\na/0.jpg\nb/1.jpg\n")
    for _ in range(2):
        start(phone)
    monkeypatch.setattr("data.collection.index.IMAGE_SUFFIXES", (*names.IMAGE_SUFFIXES, ".heic"))
    monkeypatch.setattr(names, "IMAGE_SUFFIXES", (*names.IMAGE_SUFFIXES, ".heic"))
    log.clear()
    start(phone)
    assert "82 images that the manifest does not list" in log.text
