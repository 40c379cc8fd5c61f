"""Drawn pictures: grey levels of a TIFF with white as zero, and JPEGs that end too early, alike for both decoders."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from data.images import decode
from data.images.decode import Decoder
from data.images.open import CUT_OFF
from data.stream.source import UnreadableImage
from data.tools.measure import measure_file
from tests.data.images.test_decoders import by_pillow, encoded, photo
from tests.support import read_image

LIMIT = 10**6
TINY = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I;16B"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_white_as_zero_is_the_same_picture(mode, data):
    """Pillow writes black as zero; the tag is changed in the file, and the levels are turned."""
    kind = {"1": bool, "L": np.uint8}.get(mode, np.uint16)
    levels = data.draw(arrays(kind, TINY))
    for stored, photometric in ((levels, 1), (~levels, 0)):
        image = Image.fromarray(stored)
        content = encoded(image.convert("I").convert(mode) if mode == "I;16B" else image, "TIFF")
        order = "<" if content.startswith(b"II") else ">"
        tags = [struct.pack(f"{order}HHIH", 0x0106, 3, 1, value) for value in (1, photometric)]
        assert content.count(tags[0]) == 1
        pixels = Decoder(1, LIMIT)(content.replace(*tags), "x.tif")[0].numpy()
        assert np.abs(pixels - levels * (255 / (1 if kind is bool else np.iinfo(kind).max))).max() <= 0.51


KINDS = st.fixed_dictionaries({
    "mode": st.sampled_from(["RGB", "L", "CMYK"]), "progressive": st.booleans(), "quality": st.integers(5, 98),
    "subsampling": st.sampled_from([0, 1, 2]), "restart_marker_rows": st.sampled_from([0, 1]),
})  # fmt: skip


def is_cut_off(read, content):
    with pytest.raises(UnreadableImage) as caught:
        read(content, "x")
    return caught.value.kind == CUT_OFF


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, seed=st.integers(0, 99), share=st.floats(0.6, 1), channels=st.sampled_from([1, 3]))
def test_only_the_end_marker_may_be_missing(kind, seed, share, channels):
    mode, options = kind["mode"], {key: value for key, value in kind.items() if key != "mode"}
    options |= {"subsampling": 0} if mode == "CMYK" else {}  # TurboJPEG knows no other
    content = encoded(photo(41, 57, seed).convert(mode), **options)
    decoder, patch = Decoder(channels, LIMIT), pytest.MonkeyPatch()
    whole = decoder(content, "x").numpy()
    for length in (len(content) - 1, len(content) - 2):
        assert np.array_equal(decoder(content[:length], "x"), whole)
        assert np.array_equal(by_pillow(patch, decoder, content[:length]), whole)
    scans = [start for start in range(len(content)) if content.startswith(b"\xff\xda", start)]
    drawn = min(max(int(len(content) * share), scans[0] + 20), len(content) - 4)
    for length in {drawn, len(content) - 3, *scans[1:]}:
        assert is_cut_off(decoder, content[:length])
        assert is_cut_off(lambda part, _: by_pillow(patch, decoder, part), content[:length])


def test_the_verdict_is_the_same_in_every_command(tmp_path, log):
    decode._say_mended.cache_clear()
    content = encoded(photo(), progressive=True)
    for name, length in (("whole", None), ("end", -2), ("cut", -40)):
        (tmp_path / f"{name}.jpg").write_bytes(content[:length])
    assert np.array_equal(read_image(tmp_path / "end.jpg", 3, LIMIT), read_image(tmp_path / "whole.jpg", 3, LIMIT))
    assert "without an end marker" in log.text
    facts = {name: measure_file(tmp_path / f"{name}.jpg", LIMIT) for name in ("whole", "end", "cut")}
    assert [fact.kind for fact in facts.values()] == [None, None, CUT_OFF]
    assert facts["end"].remark.startswith("a JPEG without an end marker") and facts["whole"].remark is None


@pytest.mark.parametrize("form", ["png", "tif"])
def test_grey_of_twelve_bits_in_sixteen_is_noticed(form, tmp_path):
    levels = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / f"x.{form}")
    Image.fromarray(levels * 16).save(tmp_path / f"y.{form}")
    assert "up to 4,095 of 65,535; save them times 16" in measure_file(tmp_path / f"x.{form}", LIMIT).remark
    assert measure_file(tmp_path / f"y.{form}", LIMIT).remark is None
