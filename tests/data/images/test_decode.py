"""Decoding: literal pixels for each odd kind of image, refusals for each bad one."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images.measure import measure_file
from data.images.sizes import read_upright_size
from data.stream.source import UnreadableImage
from tests.support import encoded, read_image, turned

MAX_PIXELS = 10_000_000


def read(path, channels=3):
    return read_image(path, channels, MAX_PIXELS)


def picture(mode="RGB", size=(6, 4)):
    """Four plain quarters: red, green, blue, white (in grey: their luma)."""
    image = Image.new("RGB", size, "white")
    width, height = size[0] // 2, size[1] // 2
    image.paste("red", (0, 0, width, height))
    image.paste("lime", (width, 0, size[0], height))
    image.paste("blue", (0, height, width, size[1]))
    return image.convert(mode)


RED, LIME, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(pixels):
    return [tuple(int(value) for value in pixels[y, x]) for y in (0, -1) for x in (0, -1)]


def near(pixels, colours, tolerance):
    return np.abs(np.array(corners(pixels)) - np.array(colours)).max() <= tolerance


TGA, JPEG_2000 = {"format": "TGA", "compression": "tga_rle"}, {"format": "JPEG2000", "irreversible": False}
LOSSLESS = {**dict.fromkeys(["x.png", "x.bmp", "x.tiff", "x.ppm", "x.gif"], {}), "x.tga": TGA, "x.TGA": TGA}
LOSSLESS |= {"x.jp2": JPEG_2000, "x.j2k": JPEG_2000}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_come_back_as_they_were(tmp_path, name):
    picture(size=(32, 16)).save(tmp_path / name, **LOSSLESS[name])
    pixels = read(tmp_path / name)
    assert pixels.dtype == np.uint8 and pixels.shape == (16, 32, 3) and pixels.flags.writeable
    assert np.array_equal(pixels, np.array(picture(size=(32, 16))))


def planar_tiff(order, bits):
    """Return a TIFF of a red and a blue pixel, whose planes are stored one after another."""
    planes = np.array([[1, 0], [0, 0], [0, 1]]) * (2**bits - 1)
    data = planes.astype(f"{order}u{bits // 8}").tobytes()
    starts = [8 + row * len(data) // 3 for row in range(3)]
    tags = {256: [2], 257: [1], 258: [bits] * 3, 259: [1], 262: [2], 273: starts, 277: [3], 278: [1]}
    tags |= {279: [len(data) // 3] * 3, 284: [2]}
    place = 8 + len(data) + 6 + 12 * len(tags)
    entries, further = b"", b""
    for tag, values in tags.items():
        value = struct.pack(f"{order}{len(values)}H", *values).ljust(4, b"\0")
        if len(value) > 4:
            value, further = struct.pack(f"{order}I", place + len(further)), further + value
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + value
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + further


def partial_gif():
    """Return a GIF of 8 x 4 pixels, whose only frame is green and covers the right half."""
    gif = bytearray(encoded(Image.new("RGB", (4, 4), "lime"), "GIF"))
    gif[6:8] = struct.pack("<H", 8)
    start = gif.index(b"\x2c\0\0\0\0\4\0\4\0")
    gif[start + 1 : start + 3] = struct.pack("<H", 4)
    return bytes(gif)


TGA_WITHOUT_ALPHA = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 2, 1, 32, 0x20) + bytes(
    [0, 0, 255, 0, 255, 0, 0, 0]
)
RARE = {
    **{f"{bits}{order}.tif": (planar_tiff(order, bits), [RED, BLUE]) for bits in (8, 16) for order in "<>"},
    "x.gif": (partial_gif(), [WHITE] * 4 + [LIME] * 4),
    "x.tga": (TGA_WITHOUT_ALPHA, [RED, BLUE]),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_forms_give_the_pixels_that_they_state(name, tmp_path):
    content, row = RARE[name]
    (tmp_path / name).write_bytes(content)
    assert [tuple(pixel) for pixel in read(tmp_path / name)[0].tolist()] == row


def test_an_icon_is_read_at_its_largest_size_on_white(tmp_path):
    icon = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    icon.paste((0, 0, 255, 255), (32, 0, 64, 64))
    icon.save(tmp_path / "x.ico", sizes=[(16, 16), (64, 64)])
    pixels = read(tmp_path / "x.ico")
    assert pixels.shape == (64, 64, 3) and corners(pixels) == [WHITE, BLUE, WHITE, BLUE]


def test_only_the_name_makes_a_file_tga(tmp_path):
    """TGA has no signature: other bytes could be taken for it."""
    picture().save(tmp_path / "x.png", format="TGA")
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        read(tmp_path / "x.png")
    picture().save(tmp_path / "x.tga", format="PNG")
    assert np.array_equal(read(tmp_path / "x.tga"), np.array(picture()))
    for content in (b"", b"no image at all, but long enough to be read as a header of TGA", bytes(40)):
        (tmp_path / "bad.tga").write_bytes(content)
        with pytest.raises(UnreadableImage):
            read(tmp_path / "bad.tga")


@pytest.mark.parametrize(
    "suffix, orientation",
    [("jpg", 0), ("jpg", 1), ("jpg", 2), ("png", 3), ("tiff", 4), ("webp", 5), ("avif", 6), ("png", 7), ("tiff", 8)],
)
def test_exif_orientation_is_undone(tmp_path, suffix, orientation):
    stored = picture(size=(16, 32) if orientation > 4 else (32, 16))
    stored.getexif()[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=stored.getexif().tobytes(), quality=95)
    pixels = read(tmp_path / f"x.{suffix}")
    assert pixels.shape == (16, 32, 3)
    assert near(pixels, corners(np.array(ImageOps.exif_transpose(stored))), 12)
    found = measure_file(tmp_path / f"x.{suffix}")
    assert (found.orientation, found.width, found.height) == (orientation or 1, 32, 16)
    assert read_upright_size(tmp_path / f"x.{suffix}") == (16, 32)


@pytest.mark.parametrize("background, clear", [([10, 20, 30], [10, 20, 30]), ("drop", [200, 100, 50])])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_the_background_of_transparent_pixels_is_as_stated(mode, background, clear, tmp_path):
    """The left pixel is clear, the right one is not; on white: test_corpora.py."""
    image = Image.new(mode, (2, 1), (200, 100, 50, 0) if mode == "RGBA" else 0)
    if mode == "P":
        image.putpalette([200, 100, 50, 200, 100, 50])
    image.putpixel((1, 0), (200, 100, 50, 255) if mode == "RGBA" else 1)
    image.save(tmp_path / "x.png", **({"transparency": 0} if mode == "P" else {}))
    assert read_image(tmp_path / "x.png", 3, 100, background)[0].tolist() == [clear, [200, 100, 50]]


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 255, 256, 32767, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    expected = [0, 0, 1, 127, 255]
    assert read(tmp_path / f"x.{suffix}", 1)[0, :, 0].tolist() == expected
    assert read(tmp_path / f"x.{suffix}")[0, :, 2].tolist() == expected


def test_cmyk_and_ycck_jpegs_are_converted(tmp_path):
    """Photoshop writes inks inverted, three of them as luma and chroma, and a flag that says so."""
    picture("CMYK", (32, 32)).save(tmp_path / "x.jpg", quality=95)
    assert near(read(tmp_path / "x.jpg"), [RED, LIME, BLUE, WHITE], 12)
    assert measure_file(tmp_path / "x.jpg").mode == "CMYK"
    inks = np.array(picture("CMYK", (32, 32)))
    luma = np.array(Image.fromarray(inks[..., :3]).convert("YCbCr"))
    stored = np.dstack([luma, 255 - inks[..., 3]])
    Image.fromarray(255 - stored, "CMYK").save(tmp_path / "x.jpg", quality=95)
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    flag = data.index(b"Adobe") + 11
    assert data[flag] == 0
    data[flag] = 2
    (tmp_path / "x.jpg").write_bytes(data)
    assert near(read(tmp_path / "x.jpg"), [RED, LIME, BLUE, WHITE], 12)


@pytest.mark.parametrize("mode, options, transparent", [("RGBA", {}, 1), ("RGB", {}, 0), ("P", {"transparency": 0}, 1)])
def test_what_a_manifest_states_of_the_pixels(tmp_path, mode, options, transparent):
    Image.new(mode, (4, 4)).save(tmp_path / "x.png", **options)
    found = measure_file(tmp_path / "x.png")
    assert (found.kind, found.format, found.mode, found.transparent) == (None, "PNG", mode, transparent)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.array([[0.0, 1e9]], np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.array([[-1, 70000]], np.int32)).save(tmp_path / "integer.tiff")
    for name, reason in (("float", "floating-point pixels"), ("integer", "integer pixels from -1 to 70000")):
        with pytest.raises(UnreadableImage, match=reason):
            read(tmp_path / f"{name}.tiff")


BIG = zlib.compress(bytes(9_000_000))
CHUNKS = {
    "large comment": (b"zTXt", b"workflow\0\0" + BIG, 0),
    "large text": (b"iTXt", b"workflow\0\1\0\0\0" + BIG, 0),
    "large profile": (b"iCCP", b"profile\0\0" + BIG, 0),
    "wrong checksum": (b"tEXt", b"Comment\0hello", 1),
    "transparency of no colour": (b"tRNS", b"", 0),
}


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize("name", CHUNKS)
def test_an_ancillary_chunk_of_a_png_never_decides_over_its_pixels(name, place, tmp_path):
    (kind, data, wrong), file = CHUNKS[name], tmp_path / "x.png"
    picture().save(file, exif=turned())
    expected, content = read(file), file.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)
    file.write_bytes(content[:place] + chunk + content[place:])
    assert np.array_equal(read(file), expected) and expected.shape == (6, 4, 3)
