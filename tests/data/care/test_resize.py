"""job=downsample. Equal to Pillow's resize; metadata, modes and sidecars stay; undo brings the old bytes back. Strips
are as Pillow resizes. Slow: an image of 30,000 x 30,000 pixels within 512 MiB."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data.care.resize import Shrink, shrink_file
from tests.data.test_duplicates import picture
from tests.in_process import run
from tests.support import ROOT

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WORDS = ["job=downsample", "data=image_folder", "data.root=images", "downsample.longest_px=40"]


def shrink(file, longest_px=40, max_pixels=10**8):
    return shrink_file(Shrink(file, file.parent / "trash" / file.name, longest_px, 95, max_pixels))


def test_files_keep_what_they_carry_and_come_back(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112], exif[0x010E] = 6, "a description"
    text.add_text("parameters", "a prompt, ü")
    picture(1, (120, 60)).save(root / "a.jpg", exif=exif, icc_profile=PROFILE, quality=90)
    picture(2, (60, 120)).save(root / "b.png", exif=exif, pnginfo=text, icc_profile=PROFILE)
    picture(3, (40, 30)).save(root / "small.png")
    picture(4, (90, 90)).save(root / "two.gif", save_all=True, append_images=[picture(5, (90, 90))])
    (root / "a.txt").write_text("red")
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    assert run("prepare", WORDS, tmp_path).startswith("3 of 4 images would be downsampled")
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    assert run("prepare", [*WORDS, "apply=true"], tmp_path).startswith("2 images downsampled, 1 left as they are")
    changed = {file.name for file in root.iterdir() if file.is_file() and file.read_bytes() != before[file.name]}
    assert changed == {"a.jpg", "b.png"}
    for name, size in (("a.jpg", (40, 20)), ("b.png", (20, 40))):
        with Image.open(root / name) as image:
            assert image.size == size and image.info["icc_profile"] == PROFILE
            assert image.getexif()[0x0112] == 6 and image.getexif()[0x010E] == "a description"
            assert name == "a.jpg" or image.text["parameters"] == "a prompt, ü"
    (journal,) = (root / ".atelier").glob("*.jsonl")
    undone = run("prepare", ["job=undo", *WORDS[1:3], f"source={journal}"], tmp_path)
    assert (
        undone == "3 of 3 files are back" and {f.name: f.read_bytes() for f in root.iterdir() if f.is_file()} == before
    )


MODES = {
    "1": "L", "L": "L", "LA": "LA", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA", "I;16": "I;16", "clear": "RGBA",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_resized_smoothly(mode, tmp_path):
    wide = np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16)
    image = Image.fromarray(wide) if mode == "I;16" else picture(7, (90, 60)).convert("P" if mode == "clear" else mode)
    image.save(tmp_path / "x.png", **({"transparency": 3} if mode == "clear" else {}))
    assert shrink(tmp_path / "x.png") is None
    with Image.open(tmp_path / "x.png") as small:
        assert small.size == (40, 27) and small.mode == MODES[mode]
        reference = image if mode == "I;16" else image.convert(MODES[mode])
        there = np.asarray(reference.convert("I") if mode == "I;16" else reference, float)
        assert abs(np.asarray(small, float).mean(axis=(0, 1)) - there.mean(axis=(0, 1))).max() < there.max() / 50


def test_what_cannot_be_read_stays(tmp_path):
    picture(1, (90, 60)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in shrink(tmp_path / "x.png") and (tmp_path / "x.png").stat().st_size == len(whole) // 2
    (tmp_path / "link.png").symlink_to(tmp_path / "x.png")
    assert shrink(tmp_path / "link.png") == "a link"
    assert {file.name for file in tmp_path.iterdir()} == {"x.png", "link.png"}


def test_without_libvips_large_images_stay(tmp_path, monkeypatch):
    picture(1, (90, 60)).save(tmp_path / "x.png")
    monkeypatch.setattr("data.care.resize.find_spec", lambda name: None)
    assert "make install-care" in shrink(tmp_path / "x.png", max_pixels=100)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_strips_are_as_pillow_resizes(suffix, tmp_path):
    pytest.importorskip("pyvips")
    exif = Image.Exif()
    exif[0x010E] = "a description"
    for name in ("strips", "whole"):
        picture(9, (900, 600)).save(tmp_path / f"{name}.{suffix}", exif=exif, icc_profile=PROFILE, quality=95)
    assert shrink(tmp_path / f"strips.{suffix}", 200, 100) is None and shrink(tmp_path / f"whole.{suffix}", 200) is None
    with Image.open(tmp_path / f"strips.{suffix}") as strips, Image.open(tmp_path / f"whole.{suffix}") as whole:
        assert strips.size == whole.size == (200, 133)
        assert np.abs(np.asarray(strips, float) - np.asarray(whole, float)).mean() < 1.5
        assert strips.getexif()[0x010E] == "a description" and strips.info["icc_profile"] == PROFILE
    if suffix == "jpg":
        picture(9, (90, 60)).save(tmp_path / "p.jpg", progressive=True)
        assert "progressive" in shrink(tmp_path / "p.jpg", 20, 100)
    picture(9, (90, 60)).save(tmp_path / "x.webp")
    assert "only PNG and JPEG" in shrink(tmp_path / "x.webp", 20, 100)
    picture(9, (90, 60)).save(tmp_path / f"y.{suffix}")
    assert shrink(tmp_path / f"y.{suffix}", 200, 100) == "no side is longer"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_of_900_million_pixels_within_512_mib(suffix, tmp_path):
    vips = pytest.importorskip("pyvips")
    file = tmp_path / f"huge.{suffix}"
    board = vips.Image.black(30_000, 30_000).bandjoin([vips.Image.black(30_000, 30_000) + 200, 100]).cast("uchar")
    board.copy(interpretation="srgb").write_to_file(str(file))
    code = (
        f"import sys; sys.path[0] = {str(ROOT / 'data/care')!r}; import strips\n"
        f"print(strips.shrink({str(file)!r}, {str(file)!r} + '.small', 2048, 95))\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    fault, peak_kib = said.split()  # ru_maxrss would count the parent's before exec
    assert fault == "None" and int(peak_kib) < 512 * 1024, said
    assert shrink(file, 2048) is None and file.read_bytes() == Path(f"{file}.small").read_bytes()
    with Image.open(file) as image:
        assert image.size == (2048, 2048) and image.getpixel((1000, 1000)) == pytest.approx((0, 200, 100), abs=3)
