"""Names in either Unicode form find each other, and what cannot be read costs itself alone and is named at once."""

import json
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest

from data.collection.concepts import ConceptConfig
from data.layouts.corrections import Decision, append_corrections
from data.tools.predictions import list_images
from tests.data.collection.test_collection import columns, load, put
from tests.data.layouts.test_foreign import png, write_tar
from tests.in_process import run
from tests.support import data_config, refuses
from utils.io.names import find_path


def mac(text):
    return unicodedata.normalize("NFD", text)


FORMS = [("Föhn", mac("Föhn")), (mac("Föhn"), "Föhn")]  # of the files, and of what names them


@pytest.fixture
def opened(tmp_path):
    return lambda root: load(root, tmp_path / "cache")


@pytest.mark.parametrize("ours, theirs", FORMS)
@pytest.mark.parametrize("kind", ["manifest.csv", "metadata.csv", "meta_cap.json", "x.txt", "x.png.json"])
def test_a_text_finds_its_image_in_the_other_form(opened, tmp_path, kind, ours, theirs):
    root = put(tmp_path / "root", f"{ours}/{ours}.png", "a/b.png")
    text = f"path,label,caption\n{theirs}/{theirs}.png,{theirs},found\na/b.png,a,none\n"
    if kind == "meta_cap.json":
        text = json.dumps({f"{theirs}/{theirs}.png": {"tags": "x", "caption": "found"}})
    elif kind.startswith("x"):
        text = "found" if kind.endswith("txt") else '{"caption": "found"}'
    name = kind if kind[0] != "x" else f"{ours}/{kind.replace('x', theirs, 1)}"
    (root / name).write_text(text.replace("path", "file_name") if "metadata" in kind else text)
    assert (f"{ours}/{ours}.png", "Föhn", "found") in columns(opened(root), "path", "label", "caption")


@pytest.mark.parametrize("ours, theirs", FORMS)
def test_a_text_in_a_tar_finds_its_image_in_the_other_form(opened, tmp_path, ours, theirs):
    write_tar(tmp_path / "root/0.tar", {f"{ours}.png": png(1), f"{theirs}.txt": b"found"})
    assert columns(opened(tmp_path / "root"), "caption") == [("found",)]


def test_classes_are_one_over_the_splits_of_two_systems(opened, tmp_path):
    root = put(tmp_path / "root", "train/Käse/a.png", f"val/{mac('Käse')}/a.png")
    collection = opened(root)
    assert collection.class_names("train") == collection.class_names("val") == ["Käse"]
    assert collection.class_ids([mac("Käse")]).tolist() == [0, 0]  # of an older run


def test_two_names_of_one_look_are_two_images_and_refused_where_one_is_meant(opened, tmp_path):
    both = "é"  # and a third form: half of it is composed
    names = [f"{both}{both}", mac(f"{both}{both}")]
    root = put(tmp_path / "root", *(f"{name}.png" for name in names))
    assert [path for (path,) in columns(opened(root), "path")] == [f"{name}.png" for name in sorted(names)]
    (root / f"{both}{mac(both)}.txt").write_text("whose?")
    with refuses(r"^data\.root: .*Unicode form.*rename"):
        opened(root)
    with refuses("Unicode form"):
        find_path(str(root / f"{both}{mac(both)}.png"))
    (root / "manifest.csv").write_text(f"path\n{names[0]}.png\n{names[1]}.png\n")
    assert len(opened(root)) == 2


def test_paths_of_the_configuration_and_of_predict_find_folders(opened, tmp_path, monkeypatch):
    root = put(tmp_path / mac("Böden"), f"{mac('Föhn')}/a.png", f"{mac('Föhn')}/{mac('ü')}.png", "b/a.png")
    config = data_config(root=str(tmp_path / "Böden"), concepts=[ConceptConfig(path="Föhn"), ConceptConfig(path="b")])
    assert config.root == str(root)
    monkeypatch.chdir(tmp_path)
    assert "3 training and 0 val" in run("prepare", ["job=check", "data=image_folder", "data.root=Böden"], tmp_path)
    assert [path.name for path in list_images(f"{root}/Föhn/ü.png", "input").paths] == [f"{mac('ü')}.png"]
    assert len(list_images(str(tmp_path / "Böden/Föhn"), "input").paths) == 2


def test_a_correction(opened, tmp_path):
    root = put(tmp_path / "root", f"A/{mac('ö')}.png", "B/b.png")
    now = {"was": "A", "now": "B", "verdict": "edited", "by": "labels", "at": "2026"}
    append_corrections(root, [Decision(path="A/ö.png", field="label", **now)])
    assert opened(root).class_names("train") == ["B"]


# What cannot be read.


@pytest.fixture
def other_user():
    """Be a user without rights, in a folder that is made for it; skip where the test is not root's."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    os.seteuid(65534)
    yield folder
    os.seteuid(0)
    shutil.rmtree(folder)


def trouble(root):
    """Write two images, and one of each kind that cannot be read; return what each is called in a message."""
    put(root, "cat/a.png", "dog/a.png")
    (root / "cat" / os.fsdecode(b"f\xf6hn.png")).write_bytes(b"x")
    (root / os.fsdecode(b"k\xe4se")).mkdir()
    (root / "cat/gone.png").symlink_to("/nowhere/1.png")
    (root / "cat/itself.png").symlink_to("itself.png")
    (root / "cat/circle").symlink_to(root)
    os.mkfifo(root / "dog/pipe.png")
    os.mkfifo(root / "metadata.csv")
    os.mkfifo(root / "meta_x.json")
    return {
        "2 names that are not UTF-8": (r"cat/f\xf6hn.png", r"k\xe4se"),
        "1 files and folders that cannot be read (No such file or directory)": ("cat/gone.png",),
        "1 files and folders that cannot be read (Too many levels of symbolic links)": ("cat/itself.png",),
        "1 links to folders that are not followed": ("cat/circle",),
        "3 pipes, sockets and devices": ("dog/pipe.png", "metadata.csv", "meta_x.json"),
    }


def check_said(text, expected):
    for reason, names in expected.items():
        (line,) = {line.split("not used: ")[1] for line in text.splitlines() if f"not used: {reason}" in line}
        assert all(name in line for name in names), line


@pytest.mark.parametrize("command", ["check", "manifest", "predict"])
def test_each_is_named_by_every_job_and_the_others_are_read(tmp_path, command, log):
    expected = trouble(tmp_path / "root")
    if command == "predict":
        assert len(list_images(str(tmp_path / "root"), "input").paths) == 2
    else:
        line = run("prepare", [f"job={command}", "data=image_folder", "data.root=root"], tmp_path)
        assert command != "check" or "pipes, sockets and devices: 3" in line
    check_said(log.text, expected)
    if command == "manifest":  # it lists the two; what is beside it is said again
        log.clear()
        assert len(load(tmp_path / "root", tmp_path / "cache")) == 2
        check_said(log.text, expected)


def test_what_the_user_has_no_right_to(other_user, log):
    root = put(other_user / "root", "cat/a.png", "dog/a.png", "fox/a.png")
    os.seteuid(0)
    (root / "fox").chmod(0o000)
    os.seteuid(65534)
    assert [path for (path,) in columns(load(root, other_user / "cache"), "path")] == ["cat/a.png", "dog/a.png"]
    check_said(log.text, {"1 files and folders that cannot be read (Permission denied)": ("fox/",)})
    with refuses(r"^data\.root: .*\(Permission denied"):
        load(root / "fox/below", other_user / "cache")
