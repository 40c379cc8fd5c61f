"""job=check, duplicates and filter. Literal tables of a small folder; a killed reading goes
on; the pages hold what they show."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from data.images.bytes import open_contents
from data.images.measure import FileFacts, measure_file, measure_files
from data.images.open import CUT_OFF, NOT_OPENED
from tests.data.collection.test_collection import load, put
from tests.data.layouts.test_foreign import png, write_tar
from tests.data.layouts.test_manifest import write_rows
from tests.data.tools.test_duplicates import picture
from tests.in_process import run
from tests.support import contents, placed, refuses, rows
from utils.io.files import read_json
from utils.io.journal import open_journal

APPLY = "job.apply=true"
FOLDER = ["data=image_folder", "data.root=images", "data.validation_fraction=0.0"]
TAGS = {"cat/1.png": "red, hat", "cat/2.jpg": "red", "dog/1.png": "hat, red, round"}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for number, (name, tags) in enumerate(TAGS.items()):
        picture(number).save(placed(folder / name))
        (folder / name).with_suffix(".txt").write_text(tags)
    picture(1).resize((300, 202)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "dog/copy.png")
    (folder / "dog/same.png").write_bytes((folder / "dog/1.png").read_bytes())
    (folder / "dog/cut.png").write_bytes((folder / "dog/1.png").read_bytes()[:400])
    (folder / "dog/lost.txt").write_text("red")
    return folder


@pytest.fixture
def prepare(tmp_path):
    """Return what runs a job on the images."""
    return lambda job, *words: run("prepare", [f"job={job}", *FOLDER, *words], tmp_path)


def listed(tmp_path, job):
    return {row["path"]: row["reason"] for row in rows(next(tmp_path.glob(f"outputs/care/*/{job}.jsonl")))}


def reasons(root):
    """Return why each image of weight 0 has it."""
    table = pq.read_table(root / "manifest.parquet").to_pylist()
    assert all((row["weight"] == 0) == (row["reason"] is not None) for row in table if "reason" in row)
    return {row["path"]: row["reason"] for row in table if row.get("reason")}


def test_a_filter_excludes_in_the_manifest_and_takes_back(root, prepare):
    prepare("manifest")
    unreadable = reasons(root)
    assert list(unreadable) == ["dog/cut.png"] and unreadable["dog/cut.png"].startswith("unreadable: ")
    assert prepare("filter", "job.find=tags<2").startswith("4 images would be excluded")
    assert reasons(root) == unreadable
    assert prepare("filter", APPLY, "job.find=tags<2").startswith("3 images excluded")
    few = ("cat/2.jpg", "dog/copy.png", "dog/same.png")
    assert reasons(root) == unreadable | dict.fromkeys(few, "filter: found by tags<2")
    prepare("filter", APPLY, "job.find=tags<1")
    assert set(reasons(root)) == {"dog/cut.png", "dog/copy.png", "dog/same.png"}
    prepare("filter", APPLY)
    assert reasons(root) == unreadable
    with open_journal("data.root", root / "manifest.parquet"):
        for job in (["filter", APPLY], ["manifest"]):
            with refuses("data.root: another command is writing"):
                prepare(*job)


def test_the_test_split_stays_and_its_copies_leave_training(tmp_path, prepare):
    for name in ("train/a/1.png", "train/a/2.png", "test/a/1.png", "test/a/2.png"):
        picture(1).save(placed(tmp_path / "images" / name))
    prepare("manifest")
    prepare("duplicates", APPLY)
    assert reasons(tmp_path / "images").keys() == {"train/a/1.png", "train/a/2.png"}
    found = prepare("check")
    assert "0 training, 0 validation and 2 test images" in found


def test_brightness_and_sharpness_and_pictures_that_show_nothing(tmp_path):
    Image.new("L", (7, 2), 51).save(tmp_path / "b.png")
    facts = measure_file(str(tmp_path / "b.png"), 10**6)
    assert (facts.brightness, facts.sharpness) == (0.2, 0.0) and "one colour" in facts.remark
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "b.png")
    assert "transparent" in measure_file(str(tmp_path / "b.png"), 10**6).remark
    noise = Image.effect_noise((80, 80), 50)
    noise.save(tmp_path / "c.png")
    levels = np.asarray(noise, float)
    edges = sum(np.roll(levels, shift, axis) for shift in (1, -1) for axis in (0, 1)) - 4 * levels
    assert measure_file(str(tmp_path / "c.png"), 10**6).sharpness == pytest.approx(edges[1:-1, 1:-1].var(), abs=0.01)
    noise.filter(ImageFilter.GaussianBlur(2)).save(tmp_path / "d.png")
    assert measure_file(str(tmp_path / "d.png"), 10**6).sharpness < 20
    assert measure_file(str(tmp_path / "none.png"), 9).sha256 is None


def test_a_page_counts_the_values_and_shows_sizes(root, tmp_path, prepare):
    assert "6 training and 0 validation images of 2 classes" in prepare("check")
    (folder,) = tmp_path.glob("outputs/care/images-*/check")
    found = read_json(folder / "check.json")
    figures, tables = found["figures"], found["tables"]
    assert (figures["images"], figures["images of train"], figures["images without a tag"]) == (6, 6, 3)
    assert tables["label"] == [{"label": "dog", "images": 4}, {"label": "cat", "images": 2}]
    assert tables["format"] == [{"format": "PNG", "images": 4}, {"format": "JPEG", "images": 1}]
    assert {"faults": CUT_OFF, "images": 1} in tables["faults"]
    assert tables["tags"][0] == {"tags": "red", "images": 3}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http:" not in page and "https:" not in page


def test_orphans_are_found_both_ways(root, tmp_path, prepare):
    (root / "dog/3.jpg.part").write_bytes(b"half")
    prepare("check")
    found = listed(tmp_path, "check")
    assert found.pop("dog/3.jpg.part").startswith("files of downloads")
    assert found["dog/cut.png"].startswith(CUT_OFF) and found["dog/cut.png"].endswith("an image without a sidecar")
    assert found["dog/lost.txt"].startswith("sidecars without an image")
    assert set(found) == {"dog/cut.png", "dog/lost.txt", "dog/copy.png", "dog/same.png"}
    prepare("manifest")
    (root / "cat/1.png").rename(root / "cat/3.png")
    (root / "cat/1.txt").unlink()
    with refuses("cat/1.png"):  # no other command reads it either; the list has all
        prepare("check")
    found = listed(tmp_path, "check")
    assert found["cat/1.png"] == "a row of the manifest without a file"
    assert found["cat/3.png"] == "an image without a row in the manifest; an image without a sidecar"
    (root / "manifest.parquet").unlink()
    for file in (*root.rglob("*.txt"), *root.glob("dog/*.part"), root / "dog/cut.png"):
        file.unlink()
    assert "; no fault; " in prepare("check")  # nor does any lack a sidecar
    (root / "cat/2.json").write_text('{"rating": 4}')
    assert "a bad sidecar: 1" in prepare("check", "job.verify=false")
    assert "rating 4" in listed(tmp_path, "check")["cat/2.jpg"]


@pytest.mark.parametrize("form", ["0.tar", "train-0.parquet"])
def test_shards_are_checked_and_get_a_manifest(form, tmp_path, prepare):
    images = [png(1), b"no image", png(3)]
    (tmp_path / "images").mkdir()
    if form == "0.tar":
        write_tar(tmp_path / "images" / form, {f"{row}.png": image for row, image in enumerate(images)})
    else:
        write_rows(tmp_path / "images" / form, {"image": images, "label": ["a", "a", "b"]})
    for job in ("check", "manifest", "check"):
        found = prepare(job)
        assert "not an image of a known format: 1" in found if job == "check" else found == "3 images, 1 unreadable"
    manifest = load(tmp_path / "images", tmp_path / "outputs/cache/collections")
    assert manifest.weights().tolist() == [1, 0, 1] and manifest.class_names("train") == (
        [] if form == "0.tar" else ["a", "b"]
    )
    assert [open_contents(manifest).read(row) for row in (0, 2)] == images[::2]


def test_shards_behind_a_url_are_checked(root, tmp_path, prepare):
    (root / "dog/cut.png").unlink()
    prepare("pack", "job.output=packed")
    words = ["data=image_folder", f"data.root=file://{tmp_path}/packed"]
    assert "5 training and 0 validation images of 2 classes; no fault" in run(
        "prepare", ["job=check", *words], tmp_path
    )
    with refuses("^data.root: .*URL.*pack it again"):
        run("prepare", ["job=manifest", *words], tmp_path)


def test_a_table_beside_class_folders_is_named_and_a_stray_picture_costs_itself(tmp_path, prepare):
    put(tmp_path / "images", *(f"{name}/{number}.png" for name in "ab" for number in range(9)), "stray.png")
    (tmp_path / "images/labels.csv").write_text("file,label\n1.png,x\n")
    found = prepare("check")
    assert "tables that nobody has read" in found and "images that are not in a class folder" in found


def test_copies_are_excluded_in_the_manifest(root, tmp_path, prepare):
    prepare("duplicates", "job.match=exact")
    assert listed(tmp_path, "duplicates") == {"dog/same.png": "a duplicate: dog/1.png is kept"}
    files = contents(root)
    with refuses(r"^data.root: .* run prepare.py job=manifest first"):
        prepare("duplicates", APPLY)
    prepare("manifest")
    prepare("duplicates", APPLY)
    assert reasons(root)["dog/same.png"] == "duplicates: a duplicate: dog/1.png is kept"
    assert "dog/copy.png" not in reasons(root)  # which has another label than cat/2.jpg
    assert files.items() <= contents(root).items()
    prepare("manifest")
    prepare("filter", "job.find=path:dog/", APPLY)
    prepare("duplicates", APPLY)
    assert not any(reason.startswith("duplicates") for reason in reasons(root).values())


def test_a_manifest_of_the_users_is_refused_after_the_list(root, tmp_path, prepare):
    content = "path,label\ncat/2.jpg,cat\ndog/copy.png,cat"
    (root / "manifest.csv").write_text(content)
    with refuses(r"^data\.root: .*manifest\.csv' was not written by job=manifest"):
        prepare("duplicates", APPLY)
    assert list(listed(tmp_path, "duplicates")) == ["cat/2.jpg"] and (root / "manifest.csv").read_text() == content


def test_the_manifest_and_the_tools_decode_an_image_once(root, tmp_path, monkeypatch, log, prepare):
    prepare("manifest")
    monkeypatch.setattr("data.images.measure.measure_file", lambda file, **_: pytest.fail(f"{file} is measured again"))
    prepare("duplicates")
    prepare("check")
    assert {"mode: RGB 5", "orientation: 1 5", "transparent: 0 5"} <= set(log.messages)
    assert listed(tmp_path, "check")["dog/cut.png"].startswith(CUT_OFF)


def test_a_fault_that_may_pass_is_not_kept(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("data.images.measure.measure_file", lambda *_, **__: FileFacts(None, NOT_OPENED, "busy"))
        assert measure_files(root, list(TAGS), 10**6)[0].kind == NOT_OPENED
    assert [facts.kind for facts in measure_files(root, list(TAGS), 10**6)] == [None] * 3


def test_copies_with_other_tags_stay(tmp_path, prepare):
    """Spelling makes no difference; what a kept image does not say is never lost."""
    root = tmp_path / "images"
    root.mkdir()
    texts = ["1girl, hat, smile", "1Girl, (hat:1.2), Smile", "hat", "1girl, cat", "", "rating:s, hat"]
    for number, text in enumerate(texts):
        picture(0).resize((150 + 10 * number, 101 + 7 * number)).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(text)
    prepare("duplicates")
    assert listed(tmp_path, "duplicates") == {
        f"{number}.png": "a duplicate: 1.png is kept" for number in (0, 2, 4)
    }  # of equal tags the larger one
    assert listed(tmp_path, "same_picture") == {
        "3.png": "here tag cat; in 1.png tag hat, tag smile",
        "5.png": "here rating s; in 1.png tag 1girl, tag smile",
    }
