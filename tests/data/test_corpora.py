"""Damaged and odd images of others: every file is decoded right or refused with a reason; nothing else ever happens.

Reference equality (an own PNG decoder, written from the specification), refusals, fuzzing with fixed seeds, memory and
silence (in a process of their own), and the same files through prepare.py and a training. Origins: corpora/README.md.
"""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from data.facts import measure_file
from data.image_formats import (
    CUT_OFF,
    DAMAGED,
    EMPTY,
    NO_MEMORY,
    NOT_OPENED,
    TOO_LARGE,
    UNKNOWN,
    UNSUPPORTED,
    UnreadableImage,
)
from data.manifest_writer import write_manifest
from tests.in_process import TINY, run
from tests.support import ROOT, make_collection, read_image
from tests.support import rows as read_rows
from tests.support import run as run_alone

CORPORA = Path(__file__).parent / "corpora"
PNGS = sorted([*CORPORA.glob("pngsuite/**/*.png"), *CORPORA.glob("testpngs/*.png")])
CRASHERS = sorted(CORPORA.glob("png_crashers/*.png"))
KINDS = {CUT_OFF, DAMAGED, EMPTY, TOO_LARGE, UNSUPPORTED, UNKNOWN, NOT_OPENED, NO_MEMORY}
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest undoes the filter in image_formats.py


def read(path, channels=3, max_pixels=10_000_000):
    return read_image(path, channels, max_pixels)


def name_of(path):
    return str(path.relative_to(CORPORA))


# ------------------------------------------------------------------------------------------------- reference decoding
# Source: Portable Network Graphics (PNG) Specification, third edition, sections 7 to 13.

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def read_chunks(data):
    """Return each chunk's data by its name, those of one name joined."""
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name = data[at + 4 : at + 8]
        chunks[name] = chunks.get(name, b"") + data[at + 8 : at + 8 + length]
        at += 12 + length
    return chunks


def unfilter(line, above, kind, step):
    """Undo the filter of one row of bytes."""
    if kind == 0:
        return line
    if kind == 2:
        return (line + above) % 256
    line, above = line.tolist(), above.tolist()
    for x in range(len(line)):
        left, corner = (line[x - step], above[x - step]) if x >= step else (0, 0)
        guess = left + above[x] - corner
        paeth = min((left, above[x], corner), key=lambda value: abs(guess - value))
        line[x] = (line[x] + {1: left, 3: (left + above[x]) // 2, 4: paeth}[kind]) % 256
    return np.array(line)


def take_samples(raw, width, height, depth, channels):
    """Return samples [height, width, channels] and the number of bytes that they took."""
    stride, step = -(-width * channels * depth // 8), max(1, channels * depth // 8)
    rows, above = [], np.zeros(stride, int)
    for y in range(height):
        line = np.frombuffer(raw, np.uint8, stride, y * (stride + 1) + 1).astype(int)
        above = unfilter(line, above, raw[y * (stride + 1)], step)
        rows.append(above)
    if depth == 16:
        values = np.stack(rows).reshape(height, -1, 2) @ [256, 1]
    else:
        bits = np.unpackbits(np.stack(rows).astype(np.uint8), axis=1)
        values = bits.reshape(height, -1, depth) @ (1 << np.arange(depth)[::-1])
    return values[:, : width * channels].reshape(height, width, channels), height * (stride + 1)


def decode_png(data):
    """Return a PNG's pixels on white, float [H, W, 3] from 0 to 255, and whether Pillow must round more than once."""
    chunks = read_chunks(data)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    raw, channels = zlib.decompress(chunks[b"IDAT"]), CHANNELS[colour]
    samples = np.zeros((height, width, channels), int)
    for y, x, dy, dx in PASSES if interlaced else [(0, 0, 1, 1)]:
        part = samples[y::dy, x::dx]
        if part.size:
            part[:], used = take_samples(raw, part.shape[1], part.shape[0], depth, channels)
            raw = raw[used:]
    clear, top, alpha = chunks.get(b"tRNS"), 2**depth - 1, np.ones((height, width))
    if colour == 3:
        index = samples[..., 0]
        pixels = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[index] / 255
        if clear is not None:
            alpha = np.array([*clear, *[255] * (256 - len(clear))])[index] / 255
    else:
        if clear is not None:
            alpha = 1.0 - (samples == struct.unpack(f">{channels}H", clear)).all(-1)
        if colour in (4, 6):
            samples, alpha = samples[..., :-1], samples[..., -1] / top
        pixels = np.broadcast_to(samples / top, (height, width, 3))
    return 255 * (pixels * alpha[..., None] + 1 - alpha[..., None]), depth == 16 or bool(
        ((alpha > 0) & (alpha < 1)).any()
    )


@pytest.mark.parametrize("path", PNGS, ids=name_of)
def test_every_png_has_the_pixels_of_the_specification(path):
    expected, rounded = decode_png(path.read_bytes())
    pixels = read(path)
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= (1.5 if rounded else 0.5)
    grey = read(path, 1)
    assert grey.shape == (*expected.shape[:2], 1)
    assert np.abs(grey[..., 0] - expected @ [0.299, 0.587, 0.114]).max() <= 2


def test_every_file_of_the_corpora_is_tested():
    tested = {*PNGS, *CRASHERS, *(CORPORA / "jpeg" / f"{name}.jpg" for name in JPEGS)}
    texts = {"README.md", "README", "README.ijg", "LICENSE"}
    files = [path for path in CORPORA.rglob("*") if path.is_file() and path.name not in texts]
    assert tested == set(files) and len(PNGS) == 86 and len(CRASHERS) == 23
    assert sum(path.stat().st_size for path in files) < 200_000


JPEGS = ["testorig", "testimgint", "testimgari", "testorig12"]


def test_arithmetic_coding_gives_the_pixels_of_huffman_coding():
    original, baseline, arithmetic = (read(CORPORA / "jpeg" / f"{name}.jpg") for name in JPEGS[:3])
    assert original.shape == (149, 227, 3) and original.std() > 50
    assert np.array_equal(baseline, arithmetic)
    assert np.abs(original.astype(int) - baseline).mean() < 0.5


def refusal(path, max_pixels=10_000_000):
    with pytest.raises(UnreadableImage) as caught:
        read(path, max_pixels=max_pixels)
    assert caught.value.kind in KINDS and measure_file(path, max_pixels).reason == caught.value.reason
    return caught.value.reason


def test_a_jpeg_of_twelve_bits_is_named_as_such():
    assert refusal(CORPORA / "jpeg/testorig12.jpg") == (
        "a kind of image that is not supported (a JPEG of 12 bits per channel; save the image with 8)"
    )


REASONS = {
    "bad_iCCP": "the file is damaged (it begins as PNG, but what follows is broken or cut off)",
    "badadler": "the file is damaged (OSError: broken data stream when reading image file)",
    "empty_ancillary_chunks": "the file is cut off (ValueError: Truncated cHRM chunk)",
}


@pytest.mark.parametrize("path", CRASHERS, ids=name_of)
def test_every_damaged_png_is_refused_with_a_reason(path):
    if path.stem == "badcrc":  # the checksum of its pixels' chunk alone is wrong, which no viewer minds
        assert read(path).tolist() == [[[0, 0, 0]]]
    elif path.stem == "huge_IDAT":  # its chunk states a length beyond the file's end; the pixels are whole
        assert np.array_equal(read(path), np.broadcast_to([255, 192, 203], (2, 2, 3)))
    else:
        assert refusal(path) == REASONS.get(path.stem, "the file is cut off (OSError: Truncated File Read)")


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "a Git LFS pointer, not the image; fetch it with `git",
    b"\xef\xbb\xbf \n<!DOCTYPE HTML><html>404</html>": "a web page, perhaps of a failed download; allowed are PNG,",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing; allowed are",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC; allowed are",
    b"\xff\x0a\xfa\x1f": "JPEG XL; allowed are",
    b"%PDF-1.7\n": "a PDF document; allowed are",
    b"PK\x03\x04\x14\0": "a ZIP archive; allowed are",
    b"\0" * 64: "PNG, JPEG, WEBP",
    b"GIF89a": "the file is damaged (it begins as GIF, but what follows is broken or cut off)",
    b"\xff\xd8\xff\xe0\0\x10JFIF": "the file is cut off (OSError: Truncated File Read)",
    b"RIFF\x24\0\0\0WEBPVP8 ": "the file is damaged (",
}


@pytest.mark.parametrize("data", FOREIGN, ids=lambda data: repr(data[:12]))
def test_what_is_no_image_is_named(tmp_path, data):
    (tmp_path / "x.jpg").write_bytes(data)
    reason, expected = refusal(tmp_path / "x.jpg"), FOREIGN[data]
    assert reason.startswith(expected if "(" in expected else f"not an image of a known format ({expected}")


# ------------------------------------------------------------------------------------------------------------- fuzzing


def encode(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def drawn():
    """One picture as every kind of file that is read."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    first = Image.fromarray(noise).resize((24, 24))
    both, exif = {"save_all": True, "append_images": [first.rotate(90)]}, Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    files = {
        "png": encode(first, "PNG"), "apng": encode(first, "PNG", exif=exif, **both),
        "jpeg": encode(first, "JPEG", exif=exif), "progressive": encode(first, "JPEG", progressive=True),
        "mpo": encode(first, "MPO", **both), "gif": encode(first, "GIF", **both),
        "webp": encode(first, "WEBP", exif=exif), "lossless": encode(first, "WEBP", lossless=True),
        "moving": encode(first, "WEBP", **both), "bmp": encode(first, "BMP"), "ppm": encode(first, "PPM"),
        "tiff": encode(first, "TIFF"), "lzw": encode(first, "TIFF", compression="tiff_lzw"),
    }  # fmt: skip
    return files | ({"avif": encode(first, "AVIF", exif=exif)} if features.check("avif") else {})


def outcome(path):
    """Return the pixels, or None for a refusal; anything else is an error of the test."""
    try:
        pixels = read(path, max_pixels=1_000_000)
    except UnreadableImage as error:
        assert error.kind in KINDS and error.detail and "\n" not in error.reason
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
    """Up to five bytes, half of them in the header, are replaced; half of the files are cut off as well."""
    draw = np.random.default_rng(0)
    files = [*drawn.values(), *(path.read_bytes() for path in [*PNGS[::4], *CRASHERS[:3], *CORPORA.glob("jpeg/*")])]
    read_well = 0
    for data in files:
        for _ in range(12):
            damaged = bytearray(data[: draw.integers(1, len(data)) if draw.random() < 0.5 else len(data)])
            for _ in range(draw.integers(1, 6)):
                reach = len(damaged) if draw.random() < 0.5 else min(len(damaged), 200)
                damaged[draw.integers(reach)] = draw.integers(256)
            (tmp_path / "x").write_bytes(damaged)
            readable = outcome(tmp_path / "x") is not None
            assert readable == (measure_file(tmp_path / "x", 1_000_000).kind is None)
            read_well += readable
    assert 0.05 < read_well / (12 * len(files)) < 0.6


# -------------------------------------------------------------------------------------------------- memory and silence


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
    tiff = drawn["tiff"].replace(struct.pack("<HHII", 256, 4, 1, 24), struct.pack("<HHII", 256, 4, 1, 60_000))
    tiff = tiff.replace(struct.pack("<HHII", 257, 4, 1, 24), struct.pack("<HHII", 257, 4, 1, 50_000))
    tiff = tiff.replace(struct.pack("<HHIHH", 256, 3, 1, 24, 0), struct.pack("<HHIHH", 256, 3, 1, 60_000, 0))
    tiff = tiff.replace(struct.pack("<HHIHH", 257, 3, 1, 24, 0), struct.pack("<HHIHH", 257, 3, 1, 50_000, 0))
    size = drawn["lossless"].index(b"VP8L") + 9
    webp = bytearray(drawn["lossless"])
    webp[size : size + 4] = struct.pack("<I", 16_383 | 16_383 << 14)
    files = {
        "png": png_header(60_000, 50_000) + PNG_END, "jpeg": jpeg, "bmp": bmp, "gif": gif, "tiff": tiff, "webp": webp,
        "ppm": b"P6 60000 50000 255\n", "text": png_header(1, 1) + text + PNG_END,
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


ALONE = """
import json, re, sys
from pathlib import Path
from data.decode import Decoder
from data.image_formats import UnreadableImage, read_file
read_image = lambda name: Decoder(3, 10**8)(read_file(name), name)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024
read_image(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    before = peak()
    try:
        read_image(name)
        reason = None
    except UnreadableImage as error:
        reason = error.reason
    found[name] = reason, peak() - before
print(json.dumps(found))
"""


def read_alone(first, paths):
    """Read files in a process of their own; returns (reason, growth of its peak memory in MiB) of each."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, first, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_bombs_are_refused_before_they_are_decoded(drawn, tmp_path):
    paths = sorted(make_bombs(tmp_path, drawn).iterdir())
    found = read_alone(PNGS[0], paths)
    assert len(found) == 8
    for path in paths:
        reason, grown_mib = found[str(path)]
        assert reason.startswith(DAMAGED if path.name == "text" else TOO_LARGE), (path.name, reason)
        assert grown_mib < 8, (path.name, grown_mib)


def test_nothing_is_said_of_images_that_are_merely_odd(drawn, tmp_path):
    """What Pillow warns of: cut-off EXIF, a palette with transparency, a broken MPO, a broken animation, its limit."""
    picture = Image.new("RGB", (8, 8))
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"
    (tmp_path / "exif").write_bytes(encode(picture, "JPEG", exif=exif))
    (tmp_path / "palette").write_bytes(encode(picture.convert("P"), "PNG", transparency=b"\0\x80"))
    frames = re.compile(rb"....acTL" + b"." * 12, flags=re.DOTALL)
    (tmp_path / "animation").write_bytes(frames.sub(lambda _: png_chunk(b"acTL" + bytes(8)), drawn["apng"]))
    (tmp_path / "mpo").write_bytes(drawn["mpo"].replace(b"MPF\0II*\0", b"MPF\0XX*\0"))
    (tmp_path / "size").write_bytes(png_header(10_001, 10_000) + PNG_END)
    paths = sorted(tmp_path.iterdir())
    found = read_alone(PNGS[0], paths)  # which checks that stderr stays empty
    assert [path.name for path in paths if found[str(path)][0] is not None] == ["size"], found
    broken = {path.name for path in paths if "broken metadata" in measure_file(path).traits}
    assert broken == {"exif", "animation", "mpo"}


# ------------------------------------------------------------------------------------------ manifest and training


ONE_EPOCH = ["optim.lr=0.0", "loop.total_steps=1", "loop.global_batch_size=48", "loop.batch_size=16"]


@pytest.fixture
def collection(tmp_path):
    """Class folders of good images, with those of the corpora and an empty one among them, in both splits."""
    root = make_collection(tmp_path / "images", per_class=4, classes="AB", validation=4)
    for split in ("train", "val"):
        for path in [*PNGS[::6], *CRASHERS[:6], *CORPORA.glob("jpeg/*.jpg")]:
            shutil.copyfile(path, root / split / "A" / path.name)
        (root / split / "B" / "empty.webp").write_bytes(b"")
    return root


BAD = {"A": [*(path.name for path in CRASHERS[:6] if path.stem not in ("badcrc", "huge_IDAT")), "testorig12.jpg"]}


def bad_paths():
    return sorted([f"{split}/A/{name}" for split in ("train", "val") for name in BAD["A"]] + [
        "train/B/empty.webp", "val/B/empty.webp",
    ])  # fmt: skip


def test_the_manifest_names_counts_and_weighs(collection):
    report = write_manifest(str(collection), validation_fraction=0, verify=True)
    assert [path for path, _ in report.unreadable] == bad_paths() and len(bad_paths()) == 12
    listed = [json.loads(line) for line in report.listing.read_text().splitlines()]
    assert listed == [{"path": path, "reason": reason} for path, reason in report.unreadable]
    assert report.kinds == dict(Counter(reason.split(" (")[0] for _, reason in report.unreadable))
    assert report.kinds == {DAMAGED: 4, CUT_OFF: 4, EMPTY: 2, UNSUPPORTED: 2}
    assert set(report.traits) == {"transparent", "16 bits per channel"}
    for path in bad_paths():
        (collection / path).unlink()
    mended = write_manifest(str(collection), validation_fraction=0, verify=True)
    assert mended.listing is None and not report.listing.exists() and mended.unreadable == []


def test_prepare_says_what_a_user_needs(collection, tmp_path):
    Image.new("CMYK", (4, 4)).save(collection / "train/B/inks.jpg")
    said = run_alone("prepare.py", ["job=manifest", "data=image_folder", f"data.root={collection}"], tmp_path)
    assert "unreadable image train/B/empty.webp: the file is empty (0 bytes)" in said
    assert "12 of 69 images are unreadable (the file is damaged: 4, the file is cut off: 4, " in said
    assert f"{collection}/manifest.unreadable.jsonl names each: replace or remove them, then" in said
    assert "CMYK: 1 images" in said and "(such as train/B/inks.jpg)" in said
    assert re.search(r"transparent: \d+ images, .* white \(such as train/A/", said)


def test_a_training_runs_over_them_and_its_figures_are_those_without_them(collection, tmp_path):
    """No update changes the weights: the validation figures must not depend on what could not be read."""
    clean = tmp_path / "clean"
    shutil.copytree(collection, clean)
    for path in bad_paths():
        (clean / path).unlink()
    figures = []
    for root, name in ((collection, "bad"), (clean, "good")):
        overrides = [*TINY, *ONE_EPOCH, f"data.root={root}", f"run_dir={tmp_path / name}"]
        run("finetune", overrides, tmp_path)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
        figures.append({key: value for key, value in rows[-1].items() if not key.startswith("train/")})
    listed = [json.loads(line) for line in (tmp_path / "bad/unreadable.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in listed) == bad_paths() and all(line["reason"] for line in listed)
    assert not (tmp_path / "good/unreadable.jsonl").exists()
    said = (tmp_path / "bad/log.txt").read_text()
    assert all(said.count(f"unreadable image {path}: ") == 1 for path in bad_paths())
    assert figures[0] == figures[1] and figures[0]["samples"] == 28
