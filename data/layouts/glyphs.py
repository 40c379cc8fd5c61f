"""The embedded collection: every glyph of the DejaVu and STIX fonts that matplotlib ships, drawn into PNG files.

    draw_glyphs(Path("collections/glyphs"))

The caption of a glyph is its Unicode name, its tags are the words of the name, its class is the character (characters
that look the same in DejaVu Sans are one class). The STIX faces are the validation split. The files are
images/<face>/U+0041.png and manifest.parquet.

A glyph is drawn at 44 px into 64 x 64 grey pixels, dark on white, on a common baseline and centred by its advance
width. If it extends beyond the square, it is shifted inside; if it is larger than the square, it is drawn at the
largest size that fits. Centring the ink instead would make an underscore and a combining low line look the same.
"""

import functools
import hashlib
import os
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont

from data.layouts.manifest import save_manifest
from data.layouts.names import GLYPHS, PARQUET
from data.layouts.table import build_table
from utils.errors import UserError
from utils.io.files import Json, output_errors
from utils.record.logging import log
from utils.record.progress import track

TRAIN_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic"),
)
VAL_FACES = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic")

_SIDE_PX = 64
_FONT_PX = 44
_BASELINE_PX = 46
_FACES_OF_A_CLASS = 14  # of 16
_MERGED_IN = "DejaVuSans"


def glyphs_ready(root: Path) -> bool:
    """Return whether `root` holds all glyphs; it appears complete or not at all."""
    return (root / GLYPHS).is_file() and (root / PARQUET).is_file()


def draw_glyphs(root: Path) -> None:
    """Draw the embedded collection into `root`, unless it is ready.

    The folder appears complete or not at all. If several processes draw at once, the first to finish writes it. The
    bytes of the images depend only on the fonts, Pillow and its FreeType.

    Raises UserError (`data.root`) if `root` has other content or cannot be written.
    """
    root = Path(os.path.abspath(root))
    if glyphs_ready(root):
        return
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"data.root: '{root}' does not hold the embedded collection; for images of "
            "your own, add data=image_folder; for the glyphs, name a new folder"
        )
    log.info("drawing the glyph collection into %s (once, a few seconds)", root)
    with output_errors("data.root", root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
            complete = Path(folder) / "glyphs"
            _draw_into(complete)
            try:
                os.rename(complete, root)
            except OSError:
                if not glyphs_ready(root):  # otherwise another process was faster
                    raise


def draw_glyph(face: str, code: int) -> Image.Image | None:
    """Draw the glyph of a code point as 64 x 64 grey pixels, dark on white; None if it is blank."""
    size = _FONT_PX
    while True:
        font = _load_font(face, size)
        left, top, right, bottom = font.getbbox(chr(code), anchor="ls")
        mask = Image.new("L", (max(right - left, 0), max(bottom - top, 0)), 0)
        ImageDraw.Draw(mask).text((-left, -top), chr(code), 255, font=font, anchor="ls")
        if (box := mask.getbbox()) is None:
            return None
        ink = mask.crop(box)
        if max(ink.size) <= _SIDE_PX:
            break
        size = size * _SIDE_PX // max(ink.size)
    left += _SIDE_PX // 2 - round(font.getlength(chr(code))) // 2 + box[0]
    top += _BASELINE_PX + box[1]
    corner = (min(max(left, 0), _SIDE_PX - ink.width), min(max(top, 0), _SIDE_PX - ink.height))
    image = Image.new("L", (_SIDE_PX, _SIDE_PX), 255)
    image.paste(0, corner, ink)
    return image


def name_code(code: int) -> str:
    """Return `U+0041` for a code point."""
    return f"U+{code:04X}"


def describe_code(code: int) -> tuple[str | None, list[str]]:
    """Return the caption (the Unicode name in lower case) and the tags (its words); (None, []) without a name."""
    name = unicodedata.name(chr(code), "").lower()
    return name or None, list(dict.fromkeys(name.replace("-", " ").split()))


def font_file(face: str) -> Path:
    """Return the font file of a face in matplotlib."""
    import matplotlib  # takes 0.1 s

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def read_codes(face: str) -> list[int]:
    """Return the code points of a face, ascending."""
    from fontTools.ttLib import TTFont

    with TTFont(font_file(face), lazy=True) as font:
        return sorted(font.getBestCmap())


@functools.lru_cache(maxsize=64)
def _load_font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a face at a size in pixels. Basic layout, because Raqm, if installed, would shape the characters."""
    return ImageFont.truetype(str(font_file(face)), size, layout_engine=ImageFont.Layout.BASIC)


def _draw_into(root: Path) -> None:
    """Draw all faces into a new folder, then write its manifest, and glyphs.json, a mark."""
    codes = [(face, code) for face in (*TRAIN_FACES, *VAL_FACES) for code in read_codes(face)]
    rows = []
    for face, code in track(codes, len(codes), "drawing the glyphs"):
        if (image := draw_glyph(face, code)) is None:
            continue
        file = root / "images" / face / f"{name_code(code)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, compress_type=zlib.Z_RLE)  # gives the same bytes with zlib and zlib-ng
        png = file.read_bytes()
        caption, tags = describe_code(code)
        columns = {"path": file.relative_to(root).as_posix(), "size": len(png), "tags": tags, "caption": caption}
        columns |= {"split": "val" if face in VAL_FACES else "train", "sha256": hashlib.sha256(png).hexdigest()}
        rows.append({"face": face, "code": code, **columns})
    classes = _name_classes(rows)
    columns = {name: [row[name] for row in rows] for name in ("path", "size", "sha256", "split", "tags", "caption")}
    save_manifest(root, build_table(columns, label=[classes.get(row["code"]) for row in rows]))
    (root / GLYPHS).touch()


def _name_classes(rows: list[Json]) -> dict[int, str]:
    """Return the class of each code point in nearly all faces: the lowest code point that looks the same."""
    faces = Counter(row["code"] for row in rows)
    looks = {row["code"]: row["sha256"] for row in rows if row["face"] == _MERGED_IN}
    codes = sorted(code for code, count in faces.items() if count >= _FACES_OF_A_CLASS)
    lowest = {}
    return {code: name_code(lowest.setdefault(looks.get(code, code), code)) for code in codes}
