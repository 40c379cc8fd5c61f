"""job=copy and job=downsample. Literal sets of files; run again they copy nothing; refusals. A smaller copy has the
metadata and the mode of its image."""

import io
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data.tools.copy import reduce
from tests.data.tools.test_duplicates import picture
from tests.in_process import run, run_command
from tests.support import refuses, turned

COPY = ["job=copy", "data=image_folder", "data.root=images", "data.validation_fraction=0.0", "job.to=part"]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    for name, tags in (("x/a", "red hair, hat"), ("x/b", "hat"), ("y/c", "red_hair")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9 if name == "x/a" else 5)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(tags)
    return folder


def test_a_part_by_terms(root, tmp_path):
    (root / "x/a-masklabel.png").write_bytes(b"a mask, which goes with its image")
    (root / "x/metadata.jsonl").write_text("")  # tables that describe images go, too
    (root / "meta_tags.jsonl").write_text("")
    assert "2 of 3 images" in run("prepare", [*COPY, "job.find=red_hair"], tmp_path)
    copied = sorted(p.relative_to(tmp_path / "part").as_posix() for p in (tmp_path / "part").rglob("*") if p.is_file())
    images = ["x/a-masklabel.png", "x/a.png", "x/a.txt", "x/metadata.jsonl", "y/c.png", "y/c.txt"]
    assert copied == ["meta_tags.jsonl", *images]
    assert (tmp_path / "part/x/a.png").read_bytes() == (root / "x/a.png").read_bytes()
    assert run("prepare", [*COPY, "job.find=red_hair"], tmp_path).endswith("copied 0 of 7 files")
    label, times = root / "x/a.txt", (root / "x/a.txt").stat()
    label.write_text("red hair, cap")  # of the same size, and with its time set back
    os.utime(label, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run("prepare", [*COPY, "job.find=red_hair"], tmp_path).endswith("copied 1 of 7 files")
    assert (tmp_path / "part/x/a.txt").read_text() == "red hair, cap"


def test_the_rows_of_a_manifest_go_with_the_images(root, tmp_path):
    run("prepare", ["job=manifest", *COPY[1:-1]], tmp_path)
    run("prepare", [*COPY, "job.find=hat"], tmp_path)
    assert pq.read_table(tmp_path / "part/manifest.parquet")["path"].to_pylist() == ["x/a.png", "x/b.png"]
    run("prepare", [*COPY, "job.longest_px=6", "job.to=less"], tmp_path)
    less = pq.read_table(tmp_path / "less/manifest.parquet")
    assert less["tags"].to_pylist()[1] == ["hat"] and not {"sha256", "width"} & set(less.column_names)
    (tmp_path / "part/x/a.png").write_text("another")
    for to, word in (("part", "differs from"), ("images/part", "inside data.root")):
        with refuses(rf"^job.to: .*{word}"):
            run("prepare", [*COPY, f"job.to={to}"], tmp_path)


def test_a_smaller_copy_keeps_what_files_carry_and_goes_on(tmp_path, log):
    root, small = tmp_path / "images", tmp_path / "small"
    root.mkdir()
    exif, text = turned(), PngInfo()
    exif[0x010E] = "a description"
    text.add_text("parameters", "a prompt, ü")
    picture(1, (120, 60)).save(root / "a.jpg", exif=exif, icc_profile=PROFILE, quality=90)
    picture(2, (60, 120)).save(root / "b.png", exif=exif, pnginfo=text, icc_profile=PROFILE)
    picture(3, (40, 30)).save(root / "small.png")
    picture(4, (90, 90)).save(root / "two.gif", save_all=True, append_images=[picture(5, (90, 90))])
    picture(6, (99, 99)).save(root / "huge.png")
    (root / "cut.png").write_bytes((root / "b.png").read_bytes()[:-4000])
    (root / "crc.png").write_bytes((root / "b.png").read_bytes().replace(b"a prompt", b"A prompt"))  # a wrong checksum
    (root / "a.txt").write_text("red")
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    words = ["job=downsample", *COPY[1:3], "job.longest_px=40", "job.to=small", "data.max_pixels=9000"]
    for now in (3, 1):  # the second finds all but one there
        assert f"downsampled {now} images longer than 40" in run("prepare", words, tmp_path)
        assert {file.name: file.read_bytes() for file in root.iterdir()} == before
        changed = {name for name in before if (small / name).read_bytes() != before[name]}
        assert changed == {"a.jpg", "b.png", "crc.png"} and {file.name for file in small.iterdir()} == set(before)
        (small / "b.png").unlink(missing_ok=now == 3)
    as_they_are = [line for line in log.messages if "is copied unchanged" in line]
    assert [line.split()[0] for line in as_they_are] == ["cut.png", "huge.png", "two.gif"]
    run("prepare", words, tmp_path)
    for name, size in (("a.jpg", (40, 20)), ("b.png", (20, 40))):
        with Image.open(small / name) as image:
            assert image.size == size and image.info["icc_profile"] == PROFILE
            assert image.getexif()[0x0112] == 6 and image.getexif()[0x010E] == "a description"
            assert name == "a.jpg" or image.text["parameters"] == "a prompt, ü"


def test_max_pixels_lifts_pillows_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # it refuses twice that
    (tmp_path / "images").mkdir()
    picture(1, (300, 300)).save(tmp_path / "images/large.png")
    words = ["job=downsample", *COPY[1:3], "job.longest_px=40"]
    assert "1 could not be" in run("prepare", [*words, "job.to=a", "data.max_pixels=80000"], tmp_path)
    assert "downsampled 1 images" in run("prepare", [*words, "job.to=b", "data.max_pixels=90000"], tmp_path)


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
    words = ["job=downsample", *COPY[1:3], "job.longest_px=500"]
    run("prepare", [*words, "job.to=whole"], tmp_path)
    assert run_command("prepare", [*words, f"job.to={small_disk}/small"], tmp_path, monkeypatch) == 1
    assert "job.to: " in capsys.readouterr().err
    there = {file.name: file.read_bytes() for file in (small_disk / "small").iterdir()}
    assert there and there.items() < {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}.items()


MODES = {
    "1": "L", "L": "L", "LA": "LA", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA", "I;16": "I;16", "clear": "RGBA",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_resized_smoothly(mode, tmp_path):
    wide = np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16)
    image = Image.fromarray(wide) if mode == "I;16" else picture(7, (90, 60)).convert("P" if mode == "clear" else mode)
    image.save(tmp_path / "x.png", **({"transparency": 3} if mode == "clear" else {}))
    with Image.open(tmp_path / "x.png") as large, Image.open(io.BytesIO(reduce(large, 40))) as small:
        assert small.size == (40, 27) and small.mode == MODES[mode]
        reference = image if mode == "I;16" else image.convert(MODES[mode])
        there = np.asarray(reference.convert("I") if mode == "I;16" else reference, float)
        assert abs(np.asarray(small, float).mean(axis=(0, 1)) - there.mean(axis=(0, 1))).max() < there.max() / 50
