"""job=copy. Literal sets of files; run again it copies nothing; refusals."""

import os

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.in_process import run, run_command
from tests.support import contents, placed, refuses

COPY = ["job=copy", "data=image_folder", "data.root=images", "data.validation_fraction=0.0", "job.to=part"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name, tags in (("x/a", "red hair, hat"), ("x/b", "hat"), ("y/c", "red_hair")):
        Image.new("RGB", (9, 9 if name == "x/a" else 5)).save(placed(folder / f"{name}.png"))
        (folder / f"{name}.txt").write_text(tags)
    return folder


@pytest.fixture
def copy(tmp_path):
    """Return what copies a part."""
    return lambda *words: run("prepare", [*COPY, *words], tmp_path)


def test_a_part_by_terms(root, tmp_path, copy):
    (root / "x/a-masklabel.png").write_bytes(b"a mask, which goes with its image")
    (root / "x/metadata.jsonl").write_text("")  # tables that describe images go, too
    (root / "meta_tags.jsonl").write_text("")
    assert "2 of 3 images" in copy("job.find=red_hair")
    copied = sorted(p.relative_to(tmp_path / "part").as_posix() for p in (tmp_path / "part").rglob("*") if p.is_file())
    images = ["x/a-masklabel.png", "x/a.png", "x/a.txt", "x/metadata.jsonl", "y/c.png", "y/c.txt"]
    assert copied == ["meta_tags.jsonl", *images]
    assert (tmp_path / "part/x/a.png").read_bytes() == (root / "x/a.png").read_bytes()
    assert copy("job.find=red_hair").endswith("copied 0 of 7 files")
    label, times = root / "x/a.txt", (root / "x/a.txt").stat()
    label.write_text("red hair, cap")  # of the same size, and with its time set back
    os.utime(label, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert copy("job.find=red_hair").endswith("copied 1 of 7 files")
    assert (tmp_path / "part/x/a.txt").read_text() == "red hair, cap"


def test_a_part_by_numbers(root, tmp_path, copy):
    assert "2 of 3 images" in copy("job.per_class=1")
    assert {path.parent.name for path in (tmp_path / "part").rglob("*.png")} == {"x", "y"}
    assert "1 of 3 images" in copy("job.per_class=1", "job.count=1", "job.to=one")


def test_the_rows_of_a_manifest_go_with_the_images(root, tmp_path, copy):
    run("prepare", ["job=manifest", *COPY[1:-1]], tmp_path)
    copy("job.find=hat")
    assert pq.read_table(tmp_path / "part/manifest.parquet")["path"].to_pylist() == ["x/a.png", "x/b.png"]
    (tmp_path / "part/x/a.png").write_text("another")
    for to, word in (("part", "differs from"), ("images/part", "inside data.root")):
        with refuses(rf"^job.to: .*{word}"):
            copy(f"job.to={to}")


def test_jobs_that_read_files_refuse_shards(root, tmp_path):
    run("prepare", ["job=pack", "job.output=shards", *COPY[1:-1]], tmp_path)
    jobs = (["copy", "job.to=v"], ["duplicates"])
    for job, *more in jobs:
        with refuses(r"^data.root: .*shards"):
            run("prepare", [f"job={job}", *more, COPY[1], "data.root=shards"], tmp_path)


def test_a_full_disk_ends_a_job_with_whole_files(small_disk, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.effect_noise((800, 800), 50).save(tmp_path / f"images/{number}.png")
    words = ["job=copy", *COPY[1:3]]
    run("prepare", [*words, "job.to=whole"], tmp_path)
    assert run_command("prepare", [*words, f"job.to={small_disk}/small"], tmp_path, monkeypatch) == 1
    assert "job.to: " in capsys.readouterr().err
    there = contents(small_disk / "small")
    assert there and there.items() < contents(tmp_path / "whole").items()
