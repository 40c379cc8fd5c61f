"""Decoding one image file: 8 bit, upright, on white, or an `UnreadableImage` that says why not."""

import functools
import os
import warnings

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

# What a file may hold, whatever its name says. A closed list: some of Pillow's other readers start programs (EPS runs
# Ghostscript), and a collection may come from strangers.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
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
_ALPHA = ("LA", "PA", "RGBA", "RGBa")

# Pillow warns at half of what it refuses; `max_pixels` decides here, and a warning per image would bury a log.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(Exception):
    """One image that cannot be decoded: `path`, and `reason` in a few words. Survives pickling between processes."""

    def __init__(self, path: str, reason: str) -> None:
        """Keep both as arguments, which is what pickling restores an exception from."""
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        """Return `path: reason`."""
        return f"{self.path}: {self.reason}"


def pillow_version() -> str:
    """Return which Pillow decodes and resizes, and its version: `pillow 11.3.0` or `pillow-simd 9.5.0.post2`."""
    return f"{'pillow-simd' if '.post' in PIL.__version__ else 'pillow'} {PIL.__version__}"


def read_image(path: str | os.PathLike[str], channels: int, max_pixels: int) -> np.ndarray:
    """Decode the first frame of a file to uint8 [H, W, channels], range 0-255, writable.

    channels: 1 (grey) or 3 (RGB). EXIF rotation is applied, transparency composited on white, 16-bit grey scaled to 8
    bit, CMYK converted. max_pixels: a larger image is refused from its header, before anything is decoded; Pillow's
    own limit (DEFAULT_MAX_PIXELS) holds as well.

    Raises UnreadableImage whatever the reason: absent, empty, truncated, no image, too large, unknown pixel range.
    """
    assert channels in (1, 3), channels
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise UnreadableImage(os.fspath(path), "the file is empty (0 bytes)")
            with Image.open(stream, formats=_formats()) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height} pixels"
                    raise UnreadableImage(os.fspath(path), f"{size} is more than the {max_pixels:,} allowed")
                image.load()
                return _to_array(_turn_upright(image), channels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(os.fspath(path), f"not an image of a known format ({', '.join(_formats())})") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(os.fspath(path), f"more pixels than Pillow opens ({DEFAULT_MAX_PIXELS:,})") from error
    except Exception as error:  # decoders meet damaged bytes with any exception: OSError, SyntaxError, struct.error...
        raise UnreadableImage(os.fspath(path), f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Turn and mirror a loaded image as its EXIF orientation asks. (Pillow's TIFF reader has done so on loading.)"""
    method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return image if method is None else image.transpose(method)


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    """Convert a loaded image of any mode to uint8 [H, W, channels]."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save the image with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_eight_bit(image)
    elif image.mode in _ALPHA or "transparency" in image.info:
        image = _on_white(image)
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))  # a copy: Pillow's own buffer is read-only
    return pixels[:, :, None] if channels == 1 else pixels


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8, rounding to nearest (Pillow's own conversion clips at 255), transparency to white.

    Raises ValueError for 32-bit integers that do not fit 16 bits, whose range nobody states.
    """
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"integer pixels from {pixels.min()} to {pixels.max()}; save the image with 8 or 16 bits")
    if isinstance(clear := image.info.get("transparency"), int):
        pixels[pixels == clear] = 65535
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image with an alpha channel, or with a transparent palette entry or colour, on white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def why_unreadable(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS) -> str | None:
    """Decode a file and return the reason why it cannot be read, or None where it can."""
    try:
        read_image(path, 3, max_pixels)
    except UnreadableImage as error:
        return error.reason
    return None
