"""Drawn pictures: grey levels of a TIFF with white as zero, and JPEGs that end too early, alike for both decoders."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.images import decode
from data.images.decode import Decoder
from data.images.measure import measure_file
from data.images.open import CUT_OFF
from data.stream.source import UnreadableImage
from tests.data.images.test_decoders import photo
from tests.support import encoded

LIMIT = 10**6
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I;16B"])
def test_white_as_zero_is_the_same_picture(mode):
    """Pillow writes black as zero; with the other tag in the file, the levels are turned."""
    levels = np.random.default_rng(0).integers(0, 2**16, (5, 9), np.uint16)
    image = Image.fromarray((levels >> 8).astype(np.uint8) if len(mode) == 1 else levels)
    content = encoded(image.convert("I").convert(mode) if mode == "I;16B" else image.convert(mode), "TIFF")
    order = "<" if content.startswith(b"II") else ">"
    tags = [struct.pack(f"{order}HHIH", 0x0106, 3, 1, value) for value in (1, 0)]
    assert content.count(tags[0]) == 1
    black, white = (Decoder(1, LIMIT)(content.replace(tags[0], tag), "x.tif").astype(int) for tag in tags)
    assert (black + white == 255).all() and black.std() > 50


KINDS = st.fixed_dictionaries({
    "mode": st.sampled_from(["RGB", "L", "CMYK"]), "progressive": st.booleans(), "quality": st.integers(5, 98),
    "subsampling": st.sampled_from([0, 1, 2]), "restart_marker_rows": st.sampled_from([0, 1]),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, seed=st.integers(0, 99), share=st.floats(0.6, 1), channels=st.sampled_from([1, 3]))
def test_only_the_end_marker_may_be_missing(kind, seed, share, channels):
    mode, options = kind["mode"], {key: value for key, value in kind.items() if key != "mode"}
    options |= {"subsampling": 0} if mode == "CMYK" else {}  # TurboJPEG knows no other
    content = encoded(photo(41, 57, seed).convert(mode), **options)
    decoder = Decoder(channels, LIMIT)
    whole = decoder(content, "x")
    for length in (len(content) - 1, len(content) - 2):
        assert np.array_equal(decoder(content[:length], "x"), whole)
    scans = [start for start in range(len(content)) if content.startswith(b"\xff\xda", start)]
    drawn = min(max(int(len(content) * share), scans[0] + 20), len(content) - 4)
    for length in {drawn, len(content) - 3, *scans[1:]}:
        with pytest.raises(UnreadableImage) as caught:
            decoder(content[:length], "x")
        assert caught.value.kind == CUT_OFF


def test_the_verdict_is_the_same_in_every_command(tmp_path, log):
    decode._say_once.cache_clear()
    content = encoded(photo(), progressive=True)
    for length, kind, remark in ((len(content), None, False), (-2, None, True), (-40, CUT_OFF, False)):
        (tmp_path / "x.jpg").write_bytes(content[:length])
        fact = measure_file(tmp_path / "x.jpg", LIMIT)
        assert (fact.kind, "without an end marker" in (fact.remark or "")) == (kind, remark)
    Decoder(3, LIMIT)(content[:-2], "x")
    assert "without an end marker" in log.text


def test_grey_of_twelve_bits_in_sixteen_is_noticed(tmp_path):
    levels = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "x.png")
    Image.fromarray(levels * 16).save(tmp_path / "y.tif")
    assert "up to 4,095 of 65,535" in measure_file(tmp_path / "x.png", LIMIT).remark
    assert measure_file(tmp_path / "y.tif", LIMIT).remark is None
