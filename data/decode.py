"""Decode one image file: 8 bit, upright, on a background; or raise an `UnreadableImage` with the reason."""

import functools
import io
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from data.duplicates import perceptual_hash
from utils.canvas import DEFAULT, background_rgb
from utils.errors import UserError

# The formats that are read, with any suffix. A closed list: some of Pillow's other readers start programs
# (EPS runs Ghostscript), and a collection may come from strangers. TGA has no signature, so it is tried last and only
# for files with its suffix.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
_TGA_SUFFIX = ".tga"
# Above this Pillow itself refuses a file as a decompression bomb (twice Image.MAX_IMAGE_PIXELS).
DEFAULT_MAX_PIXELS = 178_956_970

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_VARIANTS = {"MPO": "JPEG", "DIB": "BMP"}  # MPO: JPEGs with a preview or a second view behind the first
_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_TO_EIGHT_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 16 bits to 8, rounding to nearest

# The kinds of what makes a file unreadable, by which `prepare.py job=manifest` counts.
EMPTY = "the file is empty"
CUT_OFF = "the file is cut off"
DAMAGED = "the file is damaged"
UNKNOWN = "not an image of a known format"
UNSUPPORTED = "a kind of image that is not supported"
TOO_LARGE = "too many pixels"
NOT_OPENED = "the file cannot be opened"
NO_MEMORY = "too little memory"

# Signatures of files that are not images of FORMATS: (offset, bytes, name).
_FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image; fetch it with `git lfs pull`"),
    (0, b"<!doctype html", "a web page, perhaps of a failed download"),
    (0, b"<html", "a web page, perhaps of a failed download"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML document, perhaps an SVG drawing"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "a video or an unknown kind of HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"jxl ", "JPEG XL"),
    (0, b"%pdf", "a PDF document"),
    (0, b"%!ps", "PostScript"),
    (0, b"8bps", "a Photoshop document"),
    (0, b"pk\x03\x04", "a ZIP archive"),
)
_KNOWN = (
    (0, b"\x89png\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"gif8", "GIF"),
    (8, b"webp", "WEBP"),
    (0, b"bm", "BMP"),
    (0, b"ii*\0", "TIFF"),
    (0, b"mm\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"jp  ", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51".lower(), "JPEG2000"),
    (0, b"\0\0\1\0", "ICO"),
)

# Pillow's warnings (cut-off EXIF, a palette with transparency, a broken animation) would fill the training log with a
# line per image and worker; `inspect_image` reports them. Sizes are limited by `max_pixels`.
warnings.filterwarnings("ignore", module=r"PIL\.")

Used = TypeVar("Used")


class UnreadableImage(Exception):
    """One image that cannot be decoded: its path, the kind of fault, and details. Survives pickling."""

    def __init__(self, path: str, kind: str, detail: str) -> None:
        """Keep all as arguments, which is what pickling restores an exception from."""
        super().__init__(path, kind, detail)
        self.path, self.kind, self.detail = path, kind, detail

    @property
    def reason(self) -> str:
        """Return `kind (detail)`."""
        return f"{self.kind} ({self.detail})"

    def __str__(self) -> str:
        """Return `path: kind (detail)`."""
        return f"{self.path}: {self.reason}"


class _Unsupported(ValueError):
    """An image that is whole, but of a kind that has no 8-bit form."""


class Inspection(NamedTuple):
    """The findings for one file: `kind` and `reason` are None where it can be read; traits may surprise its owner.

    size_hw: of the upright image; None where it cannot be read. phash: of data/duplicates.py, where it was asked for.
    """

    kind: str | None
    reason: str | None
    traits: tuple[str, ...]
    size_hw: tuple[int, int] | None = None
    phash: int | None = None


def pillow_version() -> str:
    """Return which Pillow decodes and resizes, and its version: `pillow 11.3.0` or `pillow-simd 9.5.0.post2`."""
    return f"{'pillow-simd' if '.post' in PIL.__version__ else 'pillow'} {PIL.__version__}"


class Decoder(NamedTuple):
    """How the bytes of an image file become pixels; the arguments are those of `decode_image`."""

    channels: int
    max_pixels: int
    background: Any = DEFAULT
    shortest_px: int | None = None

    @classmethod
    def of(cls, channels: int, max_pixels: int, background: Any = DEFAULT, *, shortest_px: int | None = None) -> Self:
        """Return a decoder for a network's channels. Raises UserError (`model.in_channels`)."""
        if channels not in (1, 3):
            raise UserError(
                f"model.in_channels: {channels}; image files are read as 1 channel (grey) or 3 (RGB), so set 1 or 3"
            )
        return cls(channels, max_pixels, background, shortest_px)

    def __call__(self, content: bytes, name: str) -> Tensor:
        """Return an image, uint8 [channels, H, W]. Raises UnreadableImage."""
        pixels = decode_image(content, name, self.channels, self.max_pixels, self.background)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.shortest_px is None or min(image.shape[1:]) <= self.shortest_px:
            return image
        return resize(image, [self.shortest_px], antialias=True)

    def identity(self) -> str:
        """Return all that pixels depend on beside the content."""
        return f"{pillow_version()}; {tuple(self)}"


def read_image(path: str | os.PathLike[str], channels: int, max_pixels: int, background: Any = DEFAULT) -> np.ndarray:
    """Read and decode an image file, as `decode_image` does."""
    return decode_image(read_file(path), os.fspath(path), channels, max_pixels, background)


def has_alpha(path: str | os.PathLike[str]) -> bool:
    """Return whether an image file has an alpha channel or transparent colour, from its header; one that is not
    readable has none.
    """
    try:
        with Image.open(path, formats=_formats_of(os.fspath(path))) as image:
            return _is_transparent(image)
    except Exception:  # training reports it
        return False


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the width and height in the header of an image file that can be read; EXIF may yet turn it."""
    with Image.open(path, formats=_formats_of(os.fspath(path))) as image:
        return image.size


def read_upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the height and width that `decode_image` gives, from the header; only of a PNG all is decoded.

    Raises UnreadableImage as it does, but for damaged pixels.
    """

    def size_of(image: Image.Image) -> tuple[int, int]:
        size_hw = image.height, image.width  # before EXIF is asked for: Pillow's TIFF reader turns on loading
        return size_hw if _orientation(image) in (None, 1, 2, 3, 4) else size_hw[::-1]

    return _open(read_file(path), os.fspath(path), DEFAULT_MAX_PIXELS, size_of)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return a file's bytes. Raises UnreadableImage where it cannot be opened."""
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError, MemoryError) as error:
        raise UnreadableImage(os.fspath(path), *_explain(error)) from error


def decode_image(content: bytes, name: str, channels: int, max_pixels: int, background: Any = DEFAULT) -> np.ndarray:
    """Decode the first frame of a file's bytes to uint8 [H, W, channels], range 0-255, writable.

    channels: 1 (grey) or 3 (RGB). EXIF rotation is applied, transparency put on `background`, 16-bit grey scaled to 8
    bit, CMYK converted; of an icon the largest image is taken. max_pixels: a larger image is refused from its header,
    before anything is decoded; Pillow's own limit (DEFAULT_MAX_PIXELS) applies as well. name: of the file.

    Raises UnreadableImage for any reason: empty, cut off, damaged, not an image, too large, unsupported.
    """
    assert channels in (1, 3), channels
    return _open(content, name, max_pixels, functools.partial(_to_array, channels=channels, background=background))


def inspect_image(
    path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS, *, hashed: bool = False
) -> Inspection:
    """Decode a file and say why it cannot be read, or else what about it is converted, dropped or odd.

    hashed: with the perceptual hash.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            name = os.fspath(path)
            found = _open(read_file(path), name, max_pixels, functools.partial(_find_traits, name=name, hashed=hashed))
        except UnreadableImage as error:
            return Inspection(error.kind, error.reason, ())
    if any(issubclass(warning.category, UserWarning) for warning in said) and "broken metadata" not in found.traits:
        return found._replace(traits=(*found.traits, "broken metadata"))
    return found


def _open(content: bytes, name: str, max_pixels: int, use: Callable[[Image.Image], Used]) -> Used:
    """Return what `use` makes of an opened image that is not decoded yet; any failure becomes UnreadableImage."""
    if not content:
        raise UnreadableImage(name, EMPTY, "0 bytes")
    try:
        try:
            image = Image.open(io.BytesIO(content), formats=_formats_of(name))
        except UnidentifiedImageError as error:
            raise UnreadableImage(name, *_explain_header(content[:65536])) from error
        with image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise UnreadableImage(name, TOO_LARGE, f"{size} is more than the {max_pixels:,} allowed")
            return use(image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise any exception on damaged bytes: OSError, SyntaxError, struct.error...
        raise UnreadableImage(name, *_explain(error)) from error


def _explain(error: Exception) -> tuple[str, str]:
    """Return the kind of fault behind an exception of the decoder, and its details."""
    said = " ".join(str(error).split())
    match error:
        case Image.DecompressionBombError():
            return TOO_LARGE, f"more pixels than Pillow opens, {DEFAULT_MAX_PIXELS:,}"
        case _Unsupported():
            return UNSUPPORTED, said
        case MemoryError():
            return NO_MEMORY, "there is too little left to decode it"
        case OSError(errno=int()):
            return NOT_OPENED, f"{type(error).__name__}: {error.strerror}"
    return CUT_OFF if "truncated" in said.lower() else DAMAGED, f"{type(error).__name__}: {said}"


def _explain_header(head: bytes) -> tuple[str, str]:
    """Return the kind of fault of a file that no reader accepted, and its details, from the file's first bytes."""
    lower = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for offset, mark, name in _KNOWN:
        if lower[offset:].startswith(mark):
            if name not in _formats():
                return UNSUPPORTED, f"{name}, which this build of Pillow does not read"
            if name == "JPEG" and (bits := _bits_of_jpeg(head)) not in (None, 8):
                return UNSUPPORTED, f"a JPEG of {bits} bits per channel; save the image with 8"
            return DAMAGED, f"it begins as {name}, but what follows is broken or cut off"
    for offset, mark, name in _FOREIGN:
        if lower[offset:].startswith(mark):
            return UNKNOWN, f"{name}; allowed are {', '.join(_formats())}"
    return UNKNOWN, ", ".join(_formats())


def _bits_of_jpeg(head: bytes) -> int | None:
    """Return the bits per channel that a JPEG's frame header states, None where the header is not among these bytes."""
    at = 2
    while at + 5 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return head[at + 4]
        at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None


def _formats_of(name: str) -> tuple[str, ...]:
    """Return the formats that a file of this name may have."""
    is_tga = name.lower().endswith(_TGA_SUFFIX) and "TGA" in Image.OPEN
    return (*_formats(), "TGA") if is_tga else _formats()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def _to_array(image: Image.Image, channels: int, background: Any) -> np.ndarray:
    """Decode an opened image of any mode to uint8 [H, W, channels]."""
    return _convert(_load_upright(image)[0], channels, background_rgb(background))


def _load_upright(image: Image.Image) -> tuple[Image.Image, int | None]:
    """Decode an opened image, turn and mirror it as EXIF asks; returns the orientation as well, None if EXIF is broken.

    Pillow's TIFF reader turns on loading, and forgets the orientation.
    """
    if "transparency" in image.info:
        _scale_transparency(image)
    image.load()
    orientation = _orientation(image)
    method = _UPRIGHT.get(orientation)
    return (image if method is None else image.transpose(method)), orientation


def _convert(image: Image.Image, channels: int, colour: tuple[int, int, int] | None) -> np.ndarray:
    """Convert a loaded image of any mode to uint8 [H, W, channels]."""
    if image.mode == "F":
        raise _Unsupported("floating-point pixels have no fixed range; save the image with 8 or 16 bits per channel")
    if image.mode == "LAB":
        raise _Unsupported("L*a*b* colours; save the image as RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_eight_bit(image, colour)
    elif _is_transparent(image) and colour is not None:
        image = _on_colour(image, colour)
    elif image.mode == "RGBa":
        image = image.convert("RGBA")  # Pillow converts premultiplied colours to nothing else
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which copies even where there is nothing to do
    pixels = np.array(image)  # a copy: Pillow's own buffer is read-only
    return pixels[:, :, None] if channels == 1 else pixels


def _raw_mode(image: Image.Image) -> str:
    """Return how the file stores the pixels of an image that is not decoded yet, such as `L;4`; "" if not known."""
    arguments = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent grey or colour of a PNG to the 8 bits that its pixels will have; Pillow leaves it.

    Of 16 bits the high byte is compared, which is what Pillow keeps of the pixels.
    """
    clear, raw = image.info["transparency"], _raw_mode(image)
    if raw in ("L;2", "L;4"):
        top = 2 ** int(raw[2:]) - 1
        image.info["transparency"] = (clear & top) * (255 // top)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, 1 where none is given, None where EXIF is broken; asked again, it is 1 then."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # any, as for pixels; these are as good without it, and every viewer shows them
        return None


def _to_eight_bit(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """Scale grey of 16 bits to 8, rounding to nearest (Pillow's own conversion clips at 255), transparency to a colour.

    Raises _Unsupported for 32-bit integers that do not fit 16 bits, whose range is unknown.
    """
    pixels = np.asarray(image)
    if pixels.dtype.itemsize > 2 and (pixels.min() < 0 or pixels.max() > 65535):
        raise _Unsupported(f"integer pixels from {pixels.min()} to {pixels.max()}; save the image with 8 or 16 bits")
    grey = _TO_EIGHT_BIT[pixels]
    clear = image.info.get("transparency")
    if isinstance(clear, int) and colour is not None:
        coloured = np.repeat(grey[..., None], 3, axis=2)
        coloured[pixels == clear] = colour
        return Image.fromarray(coloured)
    return Image.fromarray(grey)


def _on_colour(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Composite an image with an alpha channel, or with a transparent palette entry or colour, on a colour."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _find_traits(image: Image.Image, name: str, hashed: bool) -> Inspection:
    """Decode an opened image and return its size, and what about it its owner may not expect."""
    raw, turned = _raw_mode(image), image.format == "TIFF" and _orientation(image) in _UPRIGHT
    upright, orientation = _load_upright(image)
    pixels = _convert(upright, 3, background_rgb(DEFAULT))
    found = {
        "several frames": _has_frames(image),
        "CMYK": image.mode == "CMYK",
        "16 bits per channel": image.mode.startswith("I") or ";16" in raw,
        "rotated by EXIF": turned or orientation in _UPRIGHT,
        "transparent": _is_transparent(image),
        "named as another format": _is_misnamed(image, name),
        "broken metadata": orientation is None,
    }
    traits = tuple(trait for trait, there in found.items() if there)
    phash = perceptual_hash(pixels) if hashed else None
    return Inspection(None, None, traits, (upright.height, upright.width), phash)


def _has_frames(image: Image.Image) -> bool:
    """Tell whether a decoded image has more than one frame; one that breaks after the first has."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # any, as for pixels; the first frame, which is all that is read, was decoded
        return True


def _is_misnamed(image: Image.Image, name: str) -> bool:
    """Return whether the suffix of a file's name is that of another format."""
    stated = Image.EXTENSION.get(os.path.splitext(name)[1].lower(), image.format)
    return _VARIANTS.get(stated, stated) != _VARIANTS.get(image.format, image.format)
