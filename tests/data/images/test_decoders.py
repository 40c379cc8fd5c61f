"""Decoders against each other: simplejpeg gives Pillow's pixels; scales, profiles and identities."""

import io
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.transforms import v2

from data.images import decode
from data.images.decode import Decoder

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest undoes the filter in image_formats.py
LIMIT = 10**6


def photo(height=67, width=93, seed=0):
    """Soft colours with edges and grain, as photographs have them."""
    draw = np.random.default_rng(seed)
    soft = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(soft).astype(int) + draw.integers(-12, 13, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 20)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, form="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


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
    **{f"orientation {orientation}": turned(orientation) for orientation in (1, 4, 6)},
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
    assert len(by_simplejpeg) == 1 and pixels.dtype == torch.uint8 and len(pixels) == channels
    assert torch.equal(pixels, by_pillow(monkeypatch, decoder, content))


def test_other_kinds_are_left_to_pillow(by_simplejpeg, monkeypatch):
    profile = PLAIN["profile"]
    for content, icc in [
        (encoded(photo().convert("CMYK")), False), (encoded(photo(), **profile), True),
        (encoded(photo(), "TIFF", compression="jpeg"), False), (encoded(photo(), "WEBP"), False),
    ]:  # fmt: skip
        decoder = Decoder(3, LIMIT, icc=icc)
        assert torch.equal(decoder(content, "x"), by_pillow(monkeypatch, decoder, content))
    assert by_simplejpeg == []


# ------------------------------------------------------------------------------------------------------- shortest side


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(800, 604), (400, 400), (129, 500)])
def test_the_shorter_side_is_as_stated(size, form, orientation, by_simplejpeg, monkeypatch):
    content = encoded(photo(*size), form, **turned(orientation), quality=95)
    shrunk = Decoder(3, LIMIT, shortest_px=128)
    whole = Decoder(3, LIMIT)(content, "x")
    expected = v2.functional.resize(whole, [128], antialias=True)
    pixels = shrunk(content, "x")
    assert pixels.shape == expected.shape and min(pixels.shape[1:]) == 128
    if form == "JPEG":
        factor = {604: 4, 400: 2, 129: 1}[min(size)]
        assert by_simplejpeg[-1][:2] == tuple(-(-side // factor) for side in size)
        assert torch.equal(pixels, by_pillow(monkeypatch, shrunk, content))
        assert (pixels.float() - expected).abs().mean() < (0.1 if factor == 1 else 3)
    else:
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("shortest_px", [67, 68, 1000])
def test_nothing_is_enlarged(form, shortest_px):
    content = encoded(photo(), form)
    assert torch.equal(Decoder(3, LIMIT, shortest_px=shortest_px)(content, "x"), Decoder(3, LIMIT)(content, "x"))


# --------------------------------------------------------------------------------------------------------- profiles


def swapped_profile():
    """sRGB with its red and green primaries exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_profile_is_applied_on_request(form):
    content = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), form, icc_profile=swapped_profile(), quality=100)
    as_stored, converted = (Decoder(3, LIMIT, icc=icc)(content, "x")[:, 8, 8].tolist() for icc in (False, True))
    assert np.abs(np.array(as_stored) - (255, 0, 0)).max() <= 3
    assert np.abs(np.array(converted) - (0, 255, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_profile_leaves_transparency_where_it_was(mode):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    content = encoded(image.quantize() if mode == "P" else image, "PNG", icc_profile=swapped_profile())
    shown, clear = Decoder(3, LIMIT, 77, icc=True)(content, "x")[:, 0].T.tolist()
    assert np.abs(np.array(shown) - (0, 255, 0)).max() <= 3 and clear == [77] * 3


@pytest.mark.parametrize("mode,profile", [("L", None), ("RGB", b"no profile"), ("I;16", None)])
def test_a_profile_that_does_not_suit_the_pixels_is_ignored(mode, profile):
    image = Image.fromarray(np.full((4, 4), 40_000, np.uint16)) if mode == "I;16" else photo().convert(mode)
    content = encoded(image, "PNG", icc_profile=profile or swapped_profile())
    assert torch.equal(Decoder(3, LIMIT, icc=True)(content, "x"), Decoder(3, LIMIT)(content, "x"))


# --------------------------------------------------------------------------------------------------------- identities


def test_an_identity_names_all_that_pixels_depend_on(monkeypatch):
    first = Decoder(3, LIMIT)
    changes = {"channels": 1, "max_pixels": 5, "background": 7, "icc": True, "shortest_px": 64}
    found = {first.identity(), *(replace(first, **{key: value}).identity() for key, value in changes.items())}
    assert set(changes) == set(asdict(first)) and len(found) == 6
    assert replace(first, background=[255, 255, 255]).identity() == first.identity()
    monkeypatch.setattr(decode, "version", lambda name: "0")
    assert first.identity() not in found
