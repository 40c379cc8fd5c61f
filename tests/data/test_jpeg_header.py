"""Headers of JPEGs: the size of a plain one, and nothing of one that needs a second look."""

import io

import pytest
from PIL import Image

from data.jpeg_header import plain_size


def encode(mode="RGB", size=(21, 13), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "JPEG", **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[274] = 6


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, 3),
        ({"mode": "L"}, 1),
        ({"progressive": True}, 3),
        ({"comment": b"a" * 300}, 3),
        ({"restart_marker_rows": 1}, 3),
    ],
)
def test_plain_files(options, channels):
    assert plain_size(encode(**options)) == (13, 21, channels)


@pytest.mark.parametrize(
    "options", [{"exif": EXIF}, {"icc_profile": b"profile"}, {"mode": "CMYK"}, {"xmp": b"<x/>"}, {"keep_rgb": True}]
)
def test_files_that_pillow_opens(options):
    assert plain_size(encode(**options)) is None


@pytest.mark.parametrize("count", range(0, 620, 7))
def test_cut_headers_do_not_raise(count):
    content = encode()
    assert plain_size(content[:count]) in (None, plain_size(content))
    assert plain_size(b"\x89PNG" + content[4:count]) is None
