"""The embedded collection: every glyph of the DejaVu and STIX fonts that matplotlib ships, drawn into PNG files.

    draw_glyphs(Path("collections/glyphs"))

A glyph's Unicode name is its caption, the words of the name its tags, the character its class (characters that DejaVu
Sans draws alike are one class). The STIX faces are the validation split, and never trained on. The files form a
user's would: images/<face>/U+0041.png with .txt and .json sidecars, and manifest.parquet.

A glyph is drawn at 44 px into 64 x 64 grey, dark on white: on one baseline, centred by its advance width. One that
would stick out is moved by as little as keeps it inside; one larger than the square is drawn at the largest size that
fits. Centring by the ink instead would make one shape of an underscore and a combining low line.
"""

import functools
import hashlib
import json
import os
import shutil
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from data.care.tool import DRY_RUN, Tool
from data.config import DataConfig
from data.manifest_writer import save_manifest
from data.table import build_table
from utils.errors import UserError
from utils.io.files import file_lock, fsync_path, output_errors, read_json, write_json
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

GLYPHS_VERSION = 1
# The hash of all pixels, and what drew them. Another FreeType may round an edge differently; glyphs.json keeps what was
# found beside this, so that two machines can be compared.
MEASURED = {
    "pixels": "2ce5e5206c03683fa5e0ac5c880cd101b62204b3f1ae2a76ab09550dabe8fe00",
    "freetype": "2.14.3",
    "matplotlib": "3.11.2",
}

TRAIN_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic"),
)
VAL_FACES = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic")

_SIDE_PX, _FONT_PX, _BASELINE_PX = 64, 44, 46
_FACES_OF_A_CLASS = 14  # of 16
_MERGED_IN = "DejaVuSans"
_ABOUT = "glyphs.json"
_WRITERS = 4  # threads; making 164,000 files waits for the disk, not for a core
_BATCH = 128  # glyphs


class _Glyph(NamedTuple):
    """One drawn glyph: its face and code point, the hash of its pixels, and its PNG file as the manifest states it."""

    face: str
    code: int
    pixels: str
    size: int
    sha256: str


class _Ink(NamedTuple):
    """The ink of a glyph: its mask, the position of its corner from the origin, and the glyph's advance."""

    mask: Image.Image
    left: int
    top: int
    advance: int


class Glyphs(Tool):
    """Draw the embedded collection into `data.root`, where it is not there yet."""

    name: Literal["glyphs"]

    def check(self, data: DataConfig) -> str:
        """Check nothing: the folder is made."""
        return DRY_RUN

    def run(self, data: DataConfig) -> str:
        """Draw it. Raises UserError (`data.root`)."""
        with counting("drawing the glyphs") as progress:
            draw_glyphs(Path(data.root), progress)
        return f"glyphs in {data.root}"


def glyphs_ready(root: Path) -> bool:
    """Tell whether `root` holds this version's glyphs, completely drawn."""
    about = root / _ABOUT
    return (
        about.is_file() and (root / "manifest.parquet").is_file() and read_json(about).get("version") == GLYPHS_VERSION
    )


def draw_glyphs(root: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Draw the embedded collection into `root`, once: where it is ready, nothing happens.

    It appears whole or not at all, and of several processes one draws while the others wait. The bytes of every image
    follow from the fonts and from Pillow's FreeType. progress: called with the code points drawn and their number.

    Raises UserError (`data.root`) where `root` is something else, and where it cannot be made.
    """
    root = Path(os.path.abspath(root))
    if glyphs_ready(root):
        return
    with output_errors("data.root", root), file_lock(root.with_name(f"{root.name}.lock")):
        if glyphs_ready(root):  # the process that held the lock has drawn them
            return
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise UserError(
                f"data.root: {str(root)!r} exists and does not hold version {GLYPHS_VERSION} of the embedded "
                "collection; set data.root to a new folder, or remove this one to have the glyphs drawn into it"
            )
        partial = root.with_name(f".{root.name}.partial")
        if partial.exists():  # of a process that died: whoever draws holds the lock
            shutil.rmtree(partial)
        _draw_into(partial, progress)
        os.rename(partial, root)
        fsync_path(root.parent)


def font_file(face: str) -> Path:
    """Return the file of a face in the fonts of matplotlib."""
    import matplotlib  # takes 0.1 s

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def draw_glyph(face: str, code: int) -> Image.Image | None:
    """Draw the glyph of a code point as 64 x 64 grey, dark on white; None where it is blank."""
    size, ink = _FONT_PX, _find_ink(face, _FONT_PX, chr(code))
    while ink is not None and max(ink.mask.size) > _SIDE_PX:
        size = min(size - 1, size * _SIDE_PX // max(ink.mask.size))
        ink = _find_ink(face, size, chr(code))
    if ink is None:
        return None
    left = _SIDE_PX // 2 - ink.advance // 2 + ink.left
    top = _BASELINE_PX + ink.top
    left = min(max(left, 0), _SIDE_PX - ink.mask.width)
    top = min(max(top, 0), _SIDE_PX - ink.mask.height)
    image = Image.new("L", (_SIDE_PX, _SIDE_PX), 255)
    image.paste(0, (left, top), ink.mask)
    return image


def encode_png(pixels: bytes, side: int) -> bytes:
    """Encode side x side grey bytes as a PNG file, the same bytes on every machine.

    Z_RLE, since only its output is the same from zlib and from zlib-ng, which some systems have in its place; it also
    takes a sixth of the time. Source: PNG specification (W3C), sections 5 and 11.
    """
    rows = b"".join(b"\0" + pixels[start : start + side] for start in range(0, side * side, side))  # filter 0: none
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packer.compress(rows) + packer.flush()), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def name_code(code: int) -> str:
    """Return `U+0041` for a code point."""
    return f"U+{code:04X}"


def describe_code(code: int) -> tuple[str | None, list[str]]:
    """Return a character's caption, its Unicode name in lower case, and tags, the name's words; (None, []) without."""
    name = unicodedata.name(chr(code), "").lower()
    return name or None, list(dict.fromkeys(name.replace("-", " ").split()))


def read_codes(face: str) -> list[int]:
    """Return the code points that a face has glyphs for, ascending."""
    from fontTools.ttLib import TTFont

    with TTFont(font_file(face), lazy=True) as font:
        return sorted(font.getBestCmap())


@functools.lru_cache(maxsize=64)
def _load_font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a face at a size in pixels. Basic layout: Raqm, where a machine has it, would shape the characters."""
    return ImageFont.truetype(str(font_file(face)), size, layout_engine=ImageFont.Layout.BASIC)


def _find_ink(face: str, size: int, char: str) -> _Ink | None:
    """Draw a character at a size and cut out its ink; None where it has none."""
    font = _load_font(face, size)
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    if right <= left or bottom <= top:
        return None
    mask = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(mask).text((-left, -top), char, 255, font=font, anchor="ls")
    box = mask.getbbox()
    return None if box is None else _Ink(mask.crop(box), left + box[0], top + box[1], round(font.getlength(char)))


def _draw_into(root: Path, progress: Callable[[int, int], None] | None) -> None:
    """Draw all faces into an absent folder, then write its manifest and glyphs.json."""
    faces = {face: read_codes(face) for face in (*TRAIN_FACES, *VAL_FACES)}
    total, done = sum(map(len, faces.values())), 0
    glyphs: list[_Glyph] = []
    batches = []
    for face, codes in faces.items():
        (root / "images" / face).mkdir(parents=True)
        for start in range(0, len(codes), _BATCH):
            batch = codes[start : start + _BATCH]
            batches.append((root / "images" / face, _draw_batch(face, batch, glyphs)))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    # After the drawing, not beside it: threads that wait for the interpreter's lock would slow both down.
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(_write_files, *zip(*batches)))
    save_manifest(root, build_table(_manifest_columns(glyphs)), "draw_glyphs")
    write_json(root / _ABOUT, _about(glyphs))


def _draw_batch(face: str, codes: list[int], glyphs: list[_Glyph]) -> dict[str, bytes]:
    """Draw some glyphs of a face, append them to `glyphs`, and return their files' names and bytes."""
    files = {}
    for code in codes:
        image = draw_glyph(face, code)
        if image is None:
            continue
        pixels, stem = image.tobytes(), name_code(code)
        png = encode_png(pixels, _SIDE_PX)
        caption, tags = describe_code(code)
        record = {"tags": tags, "caption": caption, "face": face, "char": chr(code)}
        files[f"{stem}.png"] = png
        files[f"{stem}.json"] = json.dumps(record, ensure_ascii=False).encode()
        if caption is not None:
            files[f"{stem}.txt"] = caption.encode()
        hashes = (hashlib.sha256(data).hexdigest() for data in (pixels, png))
        glyphs.append(_Glyph(face, code, next(hashes), len(png), next(hashes)))
    return files


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write new files into a folder, with three system calls each (`open` makes seven)."""
    for name, data in files.items():
        descriptor = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written < len(data):
            raise OSError(f"{folder}/{name}: only {written} of {len(data)} bytes were written; is the disk full?")


def _name_classes(glyphs: list[_Glyph]) -> dict[int, str]:
    """Return the class of each code point that nearly all faces have: the lowest code point that looks the same."""
    faces = Counter(glyph.code for glyph in glyphs)
    looks = {glyph.code: glyph.pixels for glyph in glyphs if glyph.face == _MERGED_IN}
    codes = sorted(code for code, count in faces.items() if count >= _FACES_OF_A_CLASS)
    lowest: dict[str | int, int] = {}
    return {code: name_code(lowest.setdefault(looks.get(code, code), code)) for code in codes}


def _manifest_columns(glyphs: list[_Glyph]) -> dict[str, list[Any]]:
    """Return the manifest's columns."""
    classes = _name_classes(glyphs)
    described = [describe_code(glyph.code) for glyph in glyphs]
    return {
        "path": [f"images/{glyph.face}/{name_code(glyph.code)}.png" for glyph in glyphs],
        "size": [glyph.size for glyph in glyphs],
        "sha256": [glyph.sha256 for glyph in glyphs],
        "split": ["val" if glyph.face in VAL_FACES else "train" for glyph in glyphs],
        "label": [classes.get(glyph.code) for glyph in glyphs],
        "tags": [tags for _, tags in described],
        "caption": [caption for caption, _ in described],
    }


def _about(glyphs: list[_Glyph]) -> dict[str, Any]:
    """Return what glyphs.json says: the version, the number of images, the hash of all pixels and what drew them."""
    lines = "".join(f"{glyph.face} {glyph.code} {glyph.pixels}\n" for glyph in glyphs)
    return {
        "version": GLYPHS_VERSION,
        "count": len(glyphs),
        "pixels": hashlib.sha256(lines.encode()).hexdigest(),
        "freetype": features.version("freetype2"),
        "matplotlib": version("matplotlib"),
        "measured": MEASURED,
    }
