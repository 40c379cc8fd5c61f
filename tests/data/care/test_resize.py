"""job=downsample. Equal to Pillow's resize; metadata, modes and sidecars go along; the collection stays as it is.
Strips are as Pillow resizes."""

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data.care.resize import Shrink, shrink_file
from tests.data.test_duplicates import picture
from tests.in_process import run
from utils.errors import UserError

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WORDS = ["job=downsample", "data=image_folder", "data.root=images", "job.longest_px=40"]


def shrink(file, longest_px=40, max_pixels=10**8):
    return shrink_file(Shrink(file, copy_of(file), longest_px, 95, max_pixels))


def copy_of(file):
    return file.parent / "small" / file.name


def test_a_copy_keeps_what_files_carry_and_goes_on(tmp_path):
    root, small = tmp_path / "images", tmp_path / "small"
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
    for _ in range(2):  # the second finds all there
        assert run("prepare", [*WORDS, "job.to=small"], tmp_path).startswith("4 images are in ")
        assert {file.name: file.read_bytes() for file in root.iterdir()} == before
        changed = {name for name in before if (small / name).read_bytes() != before[name]}
        assert changed == {"a.jpg", "b.png"} and {file.name for file in small.iterdir()} == set(before)
        (small / "b.png").unlink()
    run("prepare", [*WORDS, "job.to=small"], tmp_path)
    for name, size in (("a.jpg", (40, 20)), ("b.png", (20, 40))):
        with Image.open(small / name) as image:
            assert image.size == size and image.info["icc_profile"] == PROFILE
            assert image.getexif()[0x0112] == 6 and image.getexif()[0x010E] == "a description"
            assert name == "a.jpg" or image.text["parameters"] == "a prompt, ü"
    with pytest.raises(UserError, match=r"^job.to: .* inside data.root"):
        run("prepare", [*WORDS, "job.to=images/small"], tmp_path)


MODES = {
    "1": "L", "L": "L", "LA": "LA", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA", "I;16": "I;16", "clear": "RGBA",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_resized_smoothly(mode, tmp_path):
    wide = np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16)
    image = Image.fromarray(wide) if mode == "I;16" else picture(7, (90, 60)).convert("P" if mode == "clear" else mode)
    image.save(tmp_path / "x.png", **({"transparency": 3} if mode == "clear" else {}))
    assert shrink(tmp_path / "x.png") is None
    with Image.open(copy_of(tmp_path / "x.png")) as small:
        assert small.size == (40, 27) and small.mode == MODES[mode]
        reference = image if mode == "I;16" else image.convert(MODES[mode])
        there = np.asarray(reference.convert("I") if mode == "I;16" else reference, float)
        assert abs(np.asarray(small, float).mean(axis=(0, 1)) - there.mean(axis=(0, 1))).max() < there.max() / 50


def test_what_cannot_be_read_stays(tmp_path):
    picture(1, (90, 60)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in shrink(tmp_path / "x.png") and not any((tmp_path / "small").iterdir())


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
    small = tmp_path / "small"
    with Image.open(small / f"strips.{suffix}") as strips, Image.open(small / f"whole.{suffix}") as whole:
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
