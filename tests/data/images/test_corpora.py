"""Damaged and odd images of others: every file is decoded right or refused with a reason; nothing else ever happens.

Figures of the pixels, refusals, fuzzing with fixed seeds, and memory. Origins: corpora/README.md.
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from data.images.measure import measure_file
from data.images.open import CUT_OFF, DAMAGED, TOO_LARGE
from data.stream.source import UnreadableImage
from tests.support import encoded, no_large_allocation, read_image, turned
from utils.io.files import read_json

CORPORA = Path(__file__).parents[1] / "corpora"
PNGS = sorted([*CORPORA.glob("pngsuite/**/*.png"), *CORPORA.glob("testpngs/*.png")])
CRASHERS = sorted(CORPORA.glob("png_crashers/*.png"))
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest undoes the filter in image_formats.py


def read(path, channels=3, max_pixels=10_000_000):
    return read_image(path, channels, max_pixels)


def name_of(path):
    return str(path.relative_to(CORPORA))


# A decoder written from the PNG specification gave these (this file at 51de259): height, width, mean of each channel on
# white, and its mean weighted by cos(0), cos(1), ...
FIGURES = read_json(CORPORA / "pixels.json")


@pytest.mark.parametrize("path", PNGS, ids=name_of)
def test_every_png_has_the_pixels_of_the_specification(path):
    pixels, expected = read(path), FIGURES[name_of(path)]
    waves = np.cos(np.arange(pixels[..., 0].size)).reshape(*pixels.shape[:2], 1)
    figures = [*pixels.shape[:2], *pixels.mean((0, 1)), *(pixels * waves).mean((0, 1))]
    most = 0.5 if "0g16" in path.name else 0.3  # of 16-bit grey, we take the high byte, where the decoder rounded
    assert pixels.dtype == np.uint8 and figures == pytest.approx(expected, abs=most)
    grey = read(path, 1)
    assert grey.shape == (*pixels.shape[:2], 1)
    assert np.abs(grey[..., 0] - pixels @ [0.299, 0.587, 0.114]).max() <= 1


def refusal(path, max_pixels=10_000_000):
    with pytest.raises(UnreadableImage) as caught:
        read(path, max_pixels=max_pixels)
    assert measure_file(path, max_pixels).reason == caught.value.reason
    return caught.value.reason


def test_a_jpeg_of_twelve_bits_is_refused():
    assert refusal(CORPORA / "jpeg/testorig12.jpg").startswith("the file is damaged (it begins as JPEG")


DAMAGES = {"bad_iCCP": DAMAGED, "badadler": DAMAGED}


@pytest.mark.parametrize("path", CRASHERS, ids=name_of)
def test_every_damaged_png_is_refused_with_a_reason(path):
    if path.stem == "badcrc":  # the checksum of its pixels' chunk alone is wrong, which no viewer minds
        assert read(path).tolist() == [[[0, 0, 0]]]
    elif path.stem == "huge_IDAT":  # its chunk states a length beyond the file's end; the pixels are whole
        assert np.array_equal(read(path), np.broadcast_to([255, 192, 203], (2, 2, 3)))
    elif path.stem == "empty_ancillary_chunks":  # chunks that a viewer ignores
        assert read(path).shape == (1, 1, 3)
    else:
        assert refusal(path).startswith(DAMAGES.get(path.stem, CUT_OFF))


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "it begins with 'version https://git-lfs",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "it begins with '%!PS-Adobe",  # no Ghostscript is run
    b"GIF89a": "the file is damaged (it begins as GIF",
    b"\xff\xd8\xff\xe0\0\x10JFIF": "the file is cut off (OSError: Truncated File Read)",
    b"RIFF\x24\0\0\0WEBPVP8 ": "the file is damaged (",
}


@pytest.mark.parametrize("data", FOREIGN, ids=lambda data: repr(data[:12]))
def test_what_is_no_image_is_named(tmp_path, data):
    (tmp_path / "x.jpg").write_bytes(data)
    reason, expected = refusal(tmp_path / "x.jpg"), FOREIGN[data]
    assert reason.startswith(expected if "(" in expected else f"not an image of a known format ({expected}")


# ------------------------------------------------------------------------------------------------------------- fuzzing


@pytest.fixture(scope="module")
def drawn():
    """One picture as every kind of file that is read."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    first = Image.fromarray(noise).resize((24, 24))
    both, exif = {"save_all": True, "append_images": [first.rotate(90)]}, turned()
    exif[0x010F] = "maker"
    files = {
        "png": encoded(first, "PNG"), "apng": encoded(first, "PNG", exif=exif, **both),
        "jpeg": encoded(first, "JPEG", exif=exif), "progressive": encoded(first, "JPEG", progressive=True),
        "mpo": encoded(first, "MPO", **both), "gif": encoded(first, "GIF", **both),
        "webp": encoded(first, "WEBP", exif=exif), "lossless": encoded(first, "WEBP", lossless=True),
        "moving": encoded(first, "WEBP", **both), "bmp": encoded(first, "BMP"), "ppm": encoded(first, "PPM"),
        "tiff": encoded(first, "TIFF"), "lzw": encoded(first, "TIFF", compression="tiff_lzw"),
    }  # fmt: skip
    return files | ({"avif": encoded(first, "AVIF", exif=exif)} if features.check("avif") else {})


def outcome(path):
    """Return the pixels, or None for a refusal; anything else is an error of the test."""
    try:
        pixels = read(path, max_pixels=1_000_000)
    except UnreadableImage as error:
        assert not error.reason.endswith("()") and "\n" not in error.reason
        return None
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return pixels


def test_a_file_that_was_cut_off_never_gives_other_pixels(drawn, tmp_path):
    for name, data in drawn.items():
        (tmp_path / "x").write_bytes(data)
        whole = outcome(tmp_path / "x")
        kept = []
        for length in np.unique(np.linspace(0, len(data) - 1, 25).astype(int)):
            (tmp_path / "x").write_bytes(data[:length])
            pixels = outcome(tmp_path / "x")
            kept.append(pixels is not None)
            assert pixels is None or np.array_equal(pixels, whole), (name, length)
        assert whole is not None and not any(kept[:5]) and kept.count(False) > 10, name


def test_damaged_bytes_raise_nothing_else(drawn, tmp_path):
    """Up to five bytes, half of them in the header, are replaced."""
    draw, read_well = np.random.default_rng(0), 0
    for data in (data for data in drawn.values() for _ in range(8)):
        damaged = bytearray(data)
        for _ in range(draw.integers(1, 6)):
            damaged[draw.integers(len(damaged) if draw.random() < 0.5 else 100)] = draw.integers(256)
        (tmp_path / "x").write_bytes(damaged)
        readable = outcome(tmp_path / "x") is not None
        assert readable == (measure_file(tmp_path / "x", 1_000_000).kind is None)
        read_well += readable
    assert 20 < read_well < 100


# -------------------------------------------------------------------------------------------------- memory


def png_chunk(body):
    """Add length and checksum to a chunk's name and data."""
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


PNG_END = png_chunk(b"IDAT") + png_chunk(b"IEND")


def make_bombs(folder, drawn):
    """Write small files that state sizes which would take gigabytes, or that unpack to much beside the pixels."""
    text = png_chunk(b"zTXtcomment\0\0" + zlib.compress(bytes(200_000_000)))
    jpeg, at = bytearray(drawn["jpeg"]), drawn["jpeg"].index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    bmp, gif = bytearray(drawn["bmp"]), bytearray(drawn["gif"])
    bmp[18:26] = struct.pack("<ii", 60_000, 50_000)
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    size = drawn["lossless"].index(b"VP8L") + 9
    webp = bytearray(drawn["lossless"])
    webp[size : size + 4] = struct.pack("<I", 16_383 | 16_383 << 14)
    files = {
        "png": png_header(60_000, 50_000) + PNG_END, "jpeg": jpeg, "bmp": bmp, "gif": gif, "webp": webp,
        "ppm": b"P6 60000 50000 255\n", "text": png_header(1, 1) + text + PNG_END,
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux")
def test_bombs_are_refused_before_they_are_decoded(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**8)  # other tests raise it
    for path in make_bombs(tmp_path, drawn).iterdir():
        with no_large_allocation():
            reason = refusal(path, 10**8)
        assert reason.startswith(DAMAGED if path.name == "text" else TOO_LARGE), (path.name, reason)
