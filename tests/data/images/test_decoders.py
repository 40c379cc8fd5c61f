"""Decoders against each other: simplejpeg gives Pillow's pixels; scales, profiles and identities."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.transforms import v2

from data.images import decode
from data.images.decode import Decoder
from tests.support import encoded, turned

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest undoes the filter in image_formats.py
LIMIT = 10**6


def photo(height=67, width=93, seed=0):
    """Soft colours with edges and grain, as photographs have them."""
    draw = np.random.default_rng(seed)
    soft = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(soft).astype(int) + draw.integers(-12, 13, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 20)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def by_pillow(monkeypatch, decoder, content):
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "_decode_jpeg", lambda *_: None)
        return decoder(content, "x")


@pytest.fixture
def by_simplejpeg(monkeypatch):
    """The shapes that simplejpeg has decoded."""
    shapes = []

    def note(*given, **options):
        pixels = decode_jpeg(*given, **options)
        shapes.append(pixels.shape)
        return pixels

    decode_jpeg = decode.simplejpeg.decode_jpeg
    monkeypatch.setattr(decode, "simplejpeg", SimpleNamespace(decode_jpeg=note))
    return shapes


PLAIN = {
    **{f"subsampling {kind}": {"subsampling": kind, "quality": 5} for kind in (0, 1, 2)},
    **{f"orientation {orientation}": {"exif": turned(orientation)} for orientation in (1, 4, 6)},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "stored as RGB": {"keep_rgb": True},
    "profile": {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
    "two pictures": {"form": "MPO", "save_all": True, "append_images": [photo(9, 9)]},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_jpeg_has_pillows_pixels(name, mode, channels, by_simplejpeg, monkeypatch):
    content, decoder = encoded(photo().convert(mode), **PLAIN[name]), Decoder(channels, LIMIT)
    pixels = decoder(content, "x")
    assert len(by_simplejpeg) == 1 and pixels.dtype == np.uint8 and pixels.shape[2] == channels
    assert np.array_equal(pixels, by_pillow(monkeypatch, decoder, content))


def test_other_kinds_are_left_to_pillow(by_simplejpeg, monkeypatch):
    decoder = Decoder(3, LIMIT)
    for content in (
        encoded(photo().convert("CMYK")), encoded(photo(), "TIFF", compression="jpeg"), encoded(photo(), "WEBP"),
    ):  # fmt: skip
        assert np.array_equal(decoder(content, "x"), by_pillow(monkeypatch, decoder, content))
    assert by_simplejpeg == []


# ------------------------------------------------------------------------------------------------------- shortest side


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(800, 604), (400, 400), (129, 500)])
def test_the_shorter_side_is_as_stated(size, form, orientation, by_simplejpeg, monkeypatch):
    content = encoded(photo(*size), form, exif=turned(orientation), quality=95)
    shrunk = Decoder(3, LIMIT, shortest_px=128)
    whole = Decoder(3, LIMIT)(content, "x")
    expected = v2.functional.resize(torch.from_numpy(whole).permute(2, 0, 1), [128], antialias=True)
    expected = expected.permute(1, 2, 0).numpy()
    pixels = shrunk(content, "x")
    assert pixels.shape == expected.shape and min(pixels.shape[:2]) == 128
    if form == "JPEG":
        factor = {604: 4, 400: 2, 129: 1}[min(size)]
        assert by_simplejpeg[-1][:2] == tuple(-(-side // factor) for side in size)
        assert np.array_equal(pixels, by_pillow(monkeypatch, shrunk, content))
        assert np.abs(pixels.astype(float) - expected).mean() < (0.1 if factor == 1 else 3)
    else:
        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("shortest_px", [67, 68, 1000])
def test_nothing_is_enlarged(form, shortest_px):
    content = encoded(photo(), form)
    assert np.array_equal(Decoder(3, LIMIT, shortest_px=shortest_px)(content, "x"), Decoder(3, LIMIT)(content, "x"))


# --------------------------------------------------------------------------------------------------------- identities


def test_an_identity_names_all_that_pixels_depend_on(monkeypatch):
    first = Decoder(3, LIMIT)
    changes = {"channels": 1, "max_pixels": 5, "background": 7, "shortest_px": 64}
    found = {first.identity(), *(replace(first, **{key: value}).identity() for key, value in changes.items())}
    assert set(changes) == set(asdict(first)) and len(found) == 5
    assert replace(first, background=[255, 255, 255]).identity() == first.identity()
    monkeypatch.setattr("data.images.open.version", lambda name: "0")
    assert first.identity() not in found
