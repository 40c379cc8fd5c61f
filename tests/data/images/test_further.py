"""HEIF, JPEG XL and raw photographs: upright, of the stated size, by content, and named where a package is missing."""

import tempfile
from pathlib import Path

import pytest
from PIL import Image

from data.images.further import count_jxl_pixels
from data.images.measure import measure_file
from data.images.open import NO_DECODER, TOO_LARGE
from data.images.sizes import read_upright_size
from tests.support import encoded, read_image, turned, write_manifest


def corner(width=64, height=40):
    """Return a grey picture with a red corner at its upper left."""
    image = Image.effect_noise((width, height), 30).convert("RGB")
    image.paste((255, 0, 0), (0, 0, width // 3, height // 4))
    return image


def encode(form):
    """Return the file of a picture whose corner its EXIF turns to the upper right."""
    return encoded(corner(), form, exif=turned().tobytes(), quality=95)


def heic():
    pytest.importorskip("pillow_heif", reason="make install-formats").register_heif_opener()
    return encode("HEIF")


def jxl():
    """A JPEG within JPEG XL, as `cjxl` makes it of a photograph."""
    pytest.importorskip("pillow_jxl", reason="make install-formats")
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(encode("JPEG"))
        file.flush()
        with Image.open(file.name) as image:
            return encoded(image, "JXL", lossless_jpeg=True)


def dng():
    pytest.importorskip("rawpy", reason="make install-formats")
    return Path(__file__).parents[1].joinpath("corpora/raw/preview.dng").read_bytes()


KINDS = {"x.heic": heic, "x.jxl": jxl, "x.dng": dng}


@pytest.mark.parametrize("name", KINDS)
def test_a_photograph_is_upright_and_of_the_stated_size(name, tmp_path):
    content = KINDS[name]()
    names = [name] if name == "x.dng" else [name, "x.jpg"]  # others are known by their content
    for file in (tmp_path / name for name in names):
        file.write_bytes(content)
        pixels = read_image(file, 3, 10**6)
        assert pixels.shape == (64, 40, 3) and read_upright_size(file) == (64, 40)
        assert (pixels[3, -3] - pixels[3, 3].astype(int))[0] > 60 and pixels[3, -3, 1] < 90
        assert measure_file(file, 2000).kind == TOO_LARGE
    rows = write_manifest(tmp_path, verify=True).to_pylist()
    assert [(row["height"], row["width"], row["weight"]) for row in rows] == [(64, 40, 1)] * len(names)
    for length in (30, len(content) // 2):
        (tmp_path / name).write_bytes(content[:length])
        fact = measure_file(tmp_path / name, 10**6)
        assert fact.is_damaged and "\n" not in fact.reason


@pytest.mark.parametrize("name", KINDS)
def test_without_its_package_a_file_is_no_damage(name, tmp_path, without_formats):
    begins = {"x.heic": b"\0\0\0\x1cftypheic", "x.jxl": b"\xff\x0a", "x.dng": b"II*\0"}[name]
    (tmp_path / name).write_bytes(begins + bytes(99))
    fact = measure_file(tmp_path / name, 10**6)
    assert fact.kind == NO_DECODER and "make install-formats" in fact.reason and not fact.is_damaged


@pytest.mark.parametrize("width, height", [(64, 40), (100, 75), (160, 90), (9000, 3), (513, 700)])
def test_the_size_of_jpeg_xl_is_known_before_it_is_decoded(width, height, tmp_path):
    pytest.importorskip("pillow_jxl", reason="make install-formats")
    for options in ({}, {"use_container": True}):
        content = encoded(Image.new("RGB", (width, height)), "JXL", **options)
        assert count_jxl_pixels(content) == width * height
    header = 2 << 1 | height * 99 - 1 << 3 | 1 << 21  # a side of 18 bits, square, and no image
    (tmp_path / "x.jxl").write_bytes(b"\xff\x0a" + header.to_bytes(12, "little"))
    assert measure_file(tmp_path / "x.jxl", (height * 99) ** 2 - 1).kind == TOO_LARGE


def test_an_avif_that_begins_as_heif_is_left_to_pillow(tmp_path):
    content = encode("AVIF")
    brands = content.index(b"avif")
    (tmp_path / "x.avif").write_bytes(content[:brands] + b"mif1" + content[brands + 4 :])
    assert read_image(tmp_path / "x.avif", 3, 10**6).shape == (64, 40, 3)
