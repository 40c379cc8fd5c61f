"""The list of allowed image formats, and opening of files with one kind and message for each fault.

Every image file is opened by `open_image`, whichever library decodes its pixels.
"""

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version

import PIL
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from data.layouts.names import INSTALL, is_raw
from data.stream.source import UnreadableImage
from utils.start import open_name

# The allowed formats, with any suffix. Some of Pillow's other readers start programs (EPS runs Ghostscript), and a
# collection may come from an untrusted source. TGA has no signature, so it is tried last, and only for its suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
_TGA_SUFFIX = ".tga"
UNLIMITED = 2**31  # pixels, where only the header is read

_PNG = b"\x89PNG\r\n\x1a\n"
# Ancillary chunks of a PNG to keep when one of them cannot be read, from trial to trial.
_KEPT_CHUNKS = ((b"eXIf", b"tRNS", b"iCCP"), (b"eXIf", b"tRNS"), (b"eXIf",), ())
PngImagePlugin.MAX_TEXT_CHUNK = 8_000_000  # bytes of an unpacked text or profile; libpng's limit

# Pillow knows big-endian 16-bit grey only with black as zero; `load_upright` turns the other.
TiffImagePlugin.OPEN_INFO[b"MM", 0, (1,), 1, (16,), ()] = ("I;16B", "I;16B")

# The kinds of faults, as counted by `prepare.py job=manifest`.
EMPTY = "the file is empty"
CUT_OFF = "the file is cut off"
DAMAGED = "the file is damaged"
UNKNOWN = "not an image of a known format"
UNSUPPORTED = "a kind of image that is not supported"
TOO_LARGE = "too many pixels"
NOT_OPENED = "the file cannot be opened"
NO_MEMORY = "too little memory"
NO_DECODER = "its decoder is not installed"
REMARK = "remark"  # in `info`: an oddity of an image that is read
_LACKS_END = "a JPEG without an end marker, which is read, because all its data are there"
# The first bytes of files that a package reads; an AVIF may begin as HEIF does, and states its kind a little later.
_BEGINS = {
    "pillow-heif": re.compile(rb"....ftyp(he|(mif1|msf1)(?!.{0,40}avi[fs]))", re.DOTALL),
    "pillow-jxl-plugin": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    "pydicom": re.compile(rb".{128}DICM", re.DOTALL),
}
FURTHER_FORMATS = {"pillow-heif": "HEIF", "pillow-jxl-plugin": "JXL", "pydicom": "DICOM"}  # Pillow's names, and ours
_JPEG_END = b"\xff\xd9"
ORIENTATION = 0x0112  # the tag of EXIF
_BITS = 0x0102  # a tag of TIFF
RAW = "raw"  # the format of an image that is the preview in a raw photograph

# Pillow's warnings (truncated EXIF, a palette with transparency, a broken animation) would add a line to the log for
# each image and worker. `max_pixels` limits sizes.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unsupported(ValueError):
    """A valid image that has no 8-bit form."""


def decoder_versions() -> str:
    """Return the decoding libraries, such as `JPEG by simplejpeg 1.9.0, others by pillow 11.3.0`."""
    return f"JPEG by simplejpeg {version('simplejpeg')}, others by pillow {PIL.__version__}"


def allow_pixels(max_pixels: int) -> None:
    """Let Pillow open images of this size; it refuses twice its limit, also of the pictures within files."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def read_file(path: str | os.PathLike[str], name: str | None = None) -> bytes:
    """Return the bytes of a file. Raises UnreadableImage, with `name` if given, if it cannot be opened."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError, MemoryError) as error:
        raise UnreadableImage(name or os.fspath(path), *_explain(error)) from error


@contextmanager
def open_image(content: bytes, name: str, max_pixels: int, *, header: bool = False) -> Iterator[Image.Image]:
    """Open an image; any failure, in the block too, becomes UnreadableImage.

    A PNG is decoded; its ancillary chunks that cannot be read are ignored, as in libpng: a damaged or huge comment or
    profile. Other formats, and with `header` a PNG, are decoded when their pixels are used.
    """
    if not content:
        raise UnreadableImage(name, EMPTY, "0 bytes")
    try:
        yield _open(content, name, max_pixels, header)
    except UnreadableImage:
        raise
    except ImportError as error:
        raise UnreadableImage(name, NO_DECODER, f"it needs {package_of(content, name)}: {INSTALL}") from error
    except Exception as error:  # decoders raise many types on damaged bytes: OSError, SyntaxError, struct.error...
        kind, detail = _explain_header(content[:256]) if isinstance(error, UnidentifiedImageError) else _explain(error)
        raise UnreadableImage(name, kind, detail) from error


def package_of(content: bytes, name: str) -> str | None:
    """Return the package that a file needs beside Pillow: by its first bytes, or by the ending of a raw photograph."""
    if is_raw(name):
        return "rawpy"
    return next((package for package, begins in _BEGINS.items() if begins.match(content)), None)


def lacks_end(content: bytes) -> bool:
    """Return whether no end marker follows the last scan; other bytes may follow the marker."""
    return not content.endswith(_JPEG_END) and content.find(_JPEG_END, content.rfind(b"\xff\xda")) < 0


def _open(content: bytes, name: str, max_pixels: int, header: bool) -> Image.Image:
    """Open an image, and decode a PNG unless only its `header` is needed; again without chunks that cannot be read.

    Raises ImportError without the package that reads it.
    """
    if package := package_of(content, name):
        from data.images import further
    formats = (*FORMATS, "TGA") if name.lower().endswith(_TGA_SUFFIX) else FORMATS
    turn = 1
    if package == "pydicom":
        return open_name("data.images.dicom:read_dicom")(content, max_pixels, header)
    if package == "rawpy":
        content, turn = further.read_preview(content)
    elif package:
        further.load_package(package)
        formats = (FURTHER_FORMATS[package],)
        if package == "pillow-jxl-plugin" and (pixels := further.count_jxl_pixels(content)) > max_pixels:
            raise UnreadableImage(name, TOO_LARGE, f"{pixels:,} pixels are more than the {max_pixels:,} of max_pixels")
    if not header:
        allow_pixels(max_pixels)

    def load(content: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(content), formats=formats)
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise UnreadableImage(name, TOO_LARGE, f"{size} is more than the {max_pixels:,} that max_pixels allows")
        _correct_tiles(image, content)
        if image.format == "PNG" and not header:
            _scale_transparency(image)
            image.load()
        if image.format in ("JPEG", "MPO") and not header and lacks_end(content):
            image = load(open_name("data.images.jpeg:complete")(content, image.mode))
            image.info[REMARK] = _LACKS_END
        if package == "rawpy":
            image.format = RAW
            image.getexif().setdefault(ORIENTATION, turn)
        return image

    try:
        return load(content)
    except (UnreadableImage, MemoryError, Image.DecompressionBombError):
        raise
    except Exception:
        for kept in _KEPT_CHUNKS if content.startswith(_PNG) else ():
            with suppress(Exception):
                return load(_select_chunks(content, kept))
        raise


def _correct_tiles(image: Image.Image, content: bytes) -> None:
    """Let Pillow read all 16 bits of planes of a TIFF, of which it takes 8, and no alpha in a TGA that states none."""
    modes = {}
    if image.format == "TGA" and image.mode == "RGBA" and not content[17] & 15:
        image._mode = "RGB"
        modes = {"BGRA": "BGRX"}
    elif image.format == "TIFF" and 16 in image.tag_v2.get(_BITS, ()):
        modes = {band: f"{band};16{'LB'[content[:1] == b'M']}" for band in image.mode}
    for row, tile in enumerate(image.tile if modes else ()):
        image.tile[row] = tile._replace(args=(modes.get(tile.args[0], tile.args[0]), *tile.args[1:]))


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent grey or colour of a PNG to 8 bits, as its pixels will have; Pillow does not.

    For 16 bits, use the high byte, as Pillow does for pixels.
    """
    clear = image.info.get("transparency")
    raw = image.tile[0][3] if image.tile else ""
    if clear is None:
        return
    if raw in ("L;2", "L;4"):
        top = 2 ** int(raw[2:]) - 1
        image.info["transparency"] = (clear & top) * (255 // top)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _select_chunks(content: bytes, kept: tuple[bytes, ...]) -> bytes:
    """Return a PNG's critical chunks and, if their checksums are right, the ancillary ones in `kept`."""
    parts = [_PNG]
    start = len(_PNG)
    while start + 12 <= len(content):  # length, type, data, checksum
        length, kind = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + 12 + length]
        if kind[:1].isupper() or (kind in kept and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])):
            parts.append(chunk)
        start += 12 + length
    return b"".join(parts)


def _explain(error: Exception) -> tuple[str, str]:
    """Return the kind of fault for an exception of the decoder, and details."""
    text = " ".join(str(error).split())
    match error:
        case Image.DecompressionBombError():
            return TOO_LARGE, f"{text.partition(' exceeds')[0]} is more than max_pixels allows"
        case Unsupported():
            return UNSUPPORTED, text
        case RuntimeError() if "missing dependencies" in text:  # of pydicom
            return NO_DECODER, text
        case MemoryError():
            return NO_MEMORY, "not enough memory to decode it"
        case OSError(errno=int()):
            return NOT_OPENED, f"{type(error).__name__}: {error.strerror}"
    return CUT_OFF if "truncated" in text.lower() else DAMAGED, f"{type(error).__name__}: {text}"


_NO_IMAGES = (b"version https://git-lfs", b"%!PS-Adobe", b"<!DOCTYPE html", b"<html")  # what they begin with


def _explain_header(head: bytes) -> tuple[str, str]:
    """Return the kind of fault for a file that no reader accepted, and details, from its first bytes."""
    Image.init()
    allowed = (*FORMATS, *FURTHER_FORMATS.values())
    for name in filter(Image.OPEN.__contains__, allowed):
        if Image.OPEN[name][1](head):
            return DAMAGED, f"it begins as {name}, but the rest is broken, cut off or of a rare kind"
    shown = next(filter(head.startswith, _NO_IMAGES), head[:4])  # a link may lead to a secret
    formats = ", ".join(allowed).replace("HEIF", "HEIC")  # as cameras name it
    return UNKNOWN, f"it begins with {shown.decode('latin1')!r}; allowed are {formats}"
