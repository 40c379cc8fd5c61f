"""The embedded collection: every glyph of the DejaVu and STIX fonts that matplotlib ships, drawn into PNG files.

    draw_glyphs(Path("collections/glyphs"))

A glyph's Unicode name is its caption, the words of the name its tags, the character its class (characters that DejaVu
Sans draws alike are one class). The STIX faces are the validation split, and never trained on. The files are
images/<face>/U+0041.png and manifest.parquet.

A glyph is drawn at 44 px into 64 x 64 grey, dark on white: on one baseline, centred by its advance width. One that
would stick out is moved by as little as keeps it inside; one larger than the square is drawn at the largest size that
fits. Centring by the ink instead would make one shape of an underscore and a combining low line.
"""

import functools
import hashlib
import os
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont, features

from data.care.tool import DRY_RUN, Tool
from data.config import DataConfig
from data.manifest_writer import save_manifest
from data.table import build_table
from utils.errors import UserError
from utils.io.files import output_errors, read_json, write_json
from utils.record.progress import counting

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
    there = (root / _ABOUT).is_file() and (root / "manifest.parquet").is_file()
    return there and read_json(root / _ABOUT).get("version") == GLYPHS_VERSION


def draw_glyphs(root: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Draw the embedded collection into `root`, once: where it is ready, nothing happens.

    It appears whole or not at all; of several processes that draw at once, the first to end makes it. The bytes of
    every image follow from the fonts and from Pillow's FreeType. progress: called with the code points drawn and their
    number.

    Raises UserError (`data.root`) where `root` is something else, and where it cannot be made.
    """
    root = Path(os.path.abspath(root))
    if glyphs_ready(root):
        return
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"data.root: {str(root)!r} exists and does not hold version {GLYPHS_VERSION} of the embedded "
            "collection; set data.root to a new folder, or remove this one to have the glyphs drawn into it"
        )
    with output_errors("data.root", root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
            made = Path(folder) / "glyphs"
            _draw_into(made, progress)
            try:
                os.rename(made, root)
            except OSError:
                if not glyphs_ready(root):  # else another process was faster
                    raise


def draw_glyph(face: str, code: int) -> Image.Image | None:
    """Draw the glyph of a code point as 64 x 64 grey, dark on white; None where it is blank."""
    size = _FONT_PX
    while True:
        font = _load_font(face, size)
        left, top, right, bottom = font.getbbox(chr(code), anchor="ls")
        if right <= left or bottom <= top:
            return None
        mask = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(mask).text((-left, -top), chr(code), 255, font=font, anchor="ls")
        box = mask.getbbox()
        if box is None:
            return None
        ink = mask.crop(box)
        if max(ink.size) <= _SIDE_PX:
            break
        size = min(size - 1, size * _SIDE_PX // max(ink.size))
    left += _SIDE_PX // 2 - round(font.getlength(chr(code))) // 2 + box[0]
    top += _BASELINE_PX + box[1]
    corner = (min(max(left, 0), _SIDE_PX - ink.width), min(max(top, 0), _SIDE_PX - ink.height))
    image = Image.new("L", (_SIDE_PX, _SIDE_PX), 255)
    image.paste(0, corner, ink)
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


def font_file(face: str) -> Path:
    """Return the file of a face in the fonts of matplotlib."""
    import matplotlib  # takes 0.1 s

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def read_codes(face: str) -> list[int]:
    """Return the code points that a face has glyphs for, ascending."""
    from fontTools.ttLib import TTFont

    with TTFont(font_file(face), lazy=True) as font:
        return sorted(font.getBestCmap())


@functools.lru_cache(maxsize=64)
def _load_font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a face at a size in pixels. Basic layout: Raqm, where a machine has it, would shape the characters."""
    return ImageFont.truetype(str(font_file(face)), size, layout_engine=ImageFont.Layout.BASIC)


def _draw_into(root: Path, progress: Callable[[int, int], None]) -> None:
    """Draw all faces into an absent folder, then write its manifest and glyphs.json."""
    codes = [(face, code) for face in (*TRAIN_FACES, *VAL_FACES) for code in read_codes(face)]
    rows: list[dict[str, Any]] = []
    for done, (face, code) in enumerate(codes, start=1):
        if (image := draw_glyph(face, code)) is not None:
            rows.append(_write_glyph(root, face, code, image.tobytes()))
        if done % 1000 == 0 or done == len(codes):
            progress(done, len(codes))
    classes = _name_classes(rows)
    columns = {name: [row[name] for row in rows] for name in ("path", "size", "sha256", "split", "tags", "caption")}
    table = build_table({**columns, "label": [classes.get(row["code"]) for row in rows]})
    save_manifest(root, table, "draw_glyphs")
    lines = "".join(f"{row['face']} {row['code']} {row['pixels']}\n" for row in rows)
    about = {
        "version": GLYPHS_VERSION,
        "count": len(rows),
        "pixels": hashlib.sha256(lines.encode()).hexdigest(),
        "freetype": features.version("freetype2"),
        "matplotlib": version("matplotlib"),
        "measured": MEASURED,
    }
    write_json(root / _ABOUT, about)


def _write_glyph(root: Path, face: str, code: int, pixels: bytes) -> dict[str, Any]:
    """Write a glyph's file; return its row in the manifest, with what classes are made of."""
    path, png, (caption, tags) = (
        f"images/{face}/{name_code(code)}.png",
        encode_png(pixels, _SIDE_PX),
        describe_code(code),
    )
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(png)
    return {
        "path": path,
        "size": len(png),
        "sha256": hashlib.sha256(png).hexdigest(),
        "split": "val" if face in VAL_FACES else "train",
        "tags": tags,
        "caption": caption,
        "face": face,
        "code": code,
        "pixels": hashlib.sha256(pixels).hexdigest(),
    }


def _name_classes(rows: list[dict[str, Any]]) -> dict[int, str]:
    """Return the class of each code point that nearly all faces have: the lowest code point that looks the same."""
    faces = Counter(row["code"] for row in rows)
    looks = {row["code"]: row["pixels"] for row in rows if row["face"] == _MERGED_IN}
    codes = sorted(code for code, count in faces.items() if count >= _FACES_OF_A_CLASS)
    lowest: dict[str | int, int] = {}
    return {code: name_code(lowest.setdefault(looks.get(code, code), code)) for code in codes}
