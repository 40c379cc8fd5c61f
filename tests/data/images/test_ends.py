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


def tiff(levels, bits, *, white_is_zero, order="<"):
    """Return a grey TIFF of levels [H, W]; bits: 1, 4, 8, 12 or 16, rows begin at a byte."""
    height, width = levels.shape
    if bits == 16:
        body = levels.astype(f"{order}u2").tobytes()
    else:
        shifts = np.arange(bits)[::-1]
        rows = (levels[..., None] >> shifts & 1).astype(np.uint8).reshape(height, -1)
        body = np.packbits(rows, axis=1).tobytes()
    body += bytes(len(body) % 2)
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height}
    values[279] = len(body)
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(values)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "order"), [(1, "<"), (4, "<"), (8, "<"), (8, ">"), (12, "<"), (16, "<"), (16, ">")])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_white_as_zero_is_the_same_picture(bits, order, data):
    top = 2**bits - 1
    levels = data.draw(arrays(np.int64, TINY, elements=st.integers(0, top)))
    for is_white, stored in ((False, levels), (True, top - levels)):
        content = tiff(stored, bits, white_is_zero=is_white, order=order)
        pixels = Decoder(1, LIMIT)(content, "x.tif")[0].numpy()
        assert np.abs(pixels - levels * 255 / top).max() <= 0.51, (bits, is_white)


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
