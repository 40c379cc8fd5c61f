"""job=filter and job=undo. Round trip: what is moved comes back, the manifest too; what a killed job has begun is
finished by the next. Refusals: no rule, a journal that leads out of the collection, a journal before a later one."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.care.moves
from tests.in_process import run
from utils.errors import UserError

FOLDER = ["data=image_folder", "data.root=images", "data.validation_fraction=0.0"]
FILTER = ["job=filter", *FOLDER, "filter.min_tags=2", "filter.min_side_px=20"]
MOVED = {"b.png", "b.txt", "c.png", "c.json", "d.png"}


def content(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.iterdir() if path.is_file()}


def undo(tmp_path, number=-1):
    journals = sorted((tmp_path / "images/.atelier").glob("*.jsonl*"))
    return run("prepare", ["job=undo", *FOLDER, f"source={journals[number]}"], tmp_path)


@pytest.fixture
def root(tmp_path):
    """Images of which b has too few tags, and c and d.png are too small; d.txt is d.jpg's as well."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, height in (("a.png", 24), ("b.png", 24), ("c.png", 10), ("d.png", 10), ("d.jpg", 24)):
        Image.new("RGB", (30, height)).save(folder / name)
    for name, tags in (("a", "red, blue"), ("b", "red"), ("d", "red, hat")):
        (folder / f"{name}.txt").write_text(tags)
    (folder / "c.json").write_text('{"tags": ["red", "hat", "blue"]}')
    return folder


@pytest.mark.parametrize("manifest", [False, True])
def test_a_filter_moves_and_undo_brings_back(root, tmp_path, manifest):
    if manifest:
        run("prepare", ["job=manifest", *FOLDER], tmp_path)
    before = content(root)
    assert run("prepare", FILTER, tmp_path).startswith("5 files would be moved") and content(root) == before
    listed = [json.loads(line) for line in (tmp_path / "outputs/care/filter.jsonl").read_text().splitlines()]
    assert {row["path"] for row in listed} == MOVED and {row["reason"] for row in listed} == {
        "too few tags: 1", "too small: 30 x 10"
    }  # fmt: skip
    run("prepare", [*FILTER, "apply=true"], tmp_path)
    assert set(before) - set(content(root)) == MOVED
    if manifest:
        assert pq.read_table(root / "manifest.parquet")["path"].to_pylist() == ["a.png", "d.jpg"]
    assert run("prepare", [*FILTER, "apply=true"], tmp_path) == "no file to move"
    undo(tmp_path)
    assert content(root) == before


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_what_a_killed_job_has_begun_is_finished_or_undone(root, tmp_path, monkeypatch, moved):
    run("prepare", ["job=manifest", *FOLDER], tmp_path)
    before, done, move = content(root), [], data.care.moves._move

    def killed(source, target):
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(source)
        move(source, target)

    for how in ("undo", "again"):
        done.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(data.care.moves, "_move", killed)
            run("prepare", [*FILTER, "apply=true"], tmp_path)
        assert len(set(before) - set(content(root))) == moved
        if how == "undo":
            undo(tmp_path)
            assert content(root) == before
    assert run("prepare", [*FILTER, "apply=true"], tmp_path) == "no file to move"
    assert set(before) - set(content(root)) == MOVED
    undo(tmp_path)
    assert content(root) == before


def test_a_file_in_the_old_place_stays(root, tmp_path, log):
    run("prepare", [*FILTER, "apply=true"], tmp_path)
    (root / "b.txt").write_text("new")
    assert undo(tmp_path) == "4 of 5 files are back" and (root / "b.txt").read_text() == "new"
    assert "b.txt is there already" in log.text


def test_the_trash_may_lie_elsewhere(root, tmp_path):
    before = content(root)
    run("prepare", [*FILTER, "apply=true", "trash=trash"], tmp_path)
    assert not (root / ".atelier").exists()
    (journal,) = (tmp_path / "trash").glob("filter-*.jsonl")
    run("prepare", ["job=undo", *FOLDER, f"source={journal}"], tmp_path)
    assert content(root) == before


def test_what_is_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"^filter: no rule is set"):
        run("prepare", FILTER[:-2], tmp_path)
    with pytest.raises(UserError, match=r"^filter.min_tags: 2 is read by job=filter and copy only"):
        run("prepare", ["job=verify", *FILTER[1:]], tmp_path)
    with pytest.raises(UserError, match=r"^data.root: .* no column 'score'"):
        run("prepare", [*FILTER, "filter.min_score=1.0"], tmp_path)
    for source in ([], ["source=nowhere"]):
        with pytest.raises(UserError, match=r"^source: .* is no file"):
            run("prepare", ["job=undo", *FOLDER, *source], tmp_path)
    run("prepare", [*FILTER, "apply=true"], tmp_path)
    run("prepare", [*FILTER, "filter.min_tags=3", "apply=true"], tmp_path)
    with pytest.raises(UserError, match=r"^source: 'filter-.*undo it first"):
        undo(tmp_path, 0)
    undo(tmp_path, 1)
    undo(tmp_path, 0)
    for line in ('{"from": "../../out", "to": "x", "reason": "", "replaces": false}', "{}", "[]", "x"):
        (tmp_path / "images/.atelier/z-9.jsonl").write_text(line)
        with pytest.raises(UserError, match=r"^source: .*(is no journal|names)"):
            undo(tmp_path)
    (root / "manifest.csv").write_text("path,label\na.png,x\nd.jpg,y\n")
    with pytest.raises(UserError, match=r"^data.root: .*manifest.csv"):
        run("prepare", [*FILTER, "apply=true"], tmp_path)


def test_every_rule(root, tmp_path):
    for name, rating in (("a", "g"), ("b", "explicit"), ("c", "rating:general")):
        (root / f"{name}.json").write_text(json.dumps({"rating": rating, "tags": ["x"]}))

    def moved(*rules):
        run("prepare", ["job=filter", *FOLDER, *rules], tmp_path)
        lines = (tmp_path / "outputs/care/filter.jsonl").read_text().splitlines()
        paths = sorted(json.loads(line)["path"] for line in lines)
        return "".join(path[0] for path in paths if path.endswith((".png", ".jpg")))

    assert moved("filter.ratings=[general]") == "bdd"
    assert moved("filter.max_aspect=2.9") == "cd"
    Image.effect_noise((64, 64), 60).save(root / "a.png")
    assert moved("filter.min_sharpness=50.0") == "bcdd"
    run("prepare", ["job=manifest", *FOLDER], tmp_path)
    table = pq.read_table(root / "manifest.parquet")
    pq.write_table(table.append_column("score", pa.array([1.0, 2.0, None, 3.0, 0.5])), root / "manifest.parquet")
    assert moved("filter.min_score=1.5") == "acd"
    pq.write_table(table.append_column("score", pa.array(list("abcde"))), root / "manifest.parquet")
    with pytest.raises(UserError, match=r"^filter.min_score: .*no numbers"):
        moved("filter.min_score=1.5")
