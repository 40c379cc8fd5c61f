"""Convert the pixels of any image mode to 8 bits, upright, on a background; read headers."""

import functools
import io
import os

import numpy as np
from PIL import Image, ImageCms

from data.images.open import DEFAULT_MAX_PIXELS, Unsupported, open_image, read_file

_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112  # tags of TIFF and EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_TO_EIGHT_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 16 bits to 8, rounding to nearest


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent colour."""
    return image.mode in _ALPHA or "transparency" in image.info


def load_upright(image: Image.Image) -> Image.Image:
    """Decode an opened image and apply EXIF rotation.

    Pillow's TIFF reader already rotates when loading, and removes the orientation.
    """
    if "transparency" in image.info:
        _scale_transparency(image)
    image.load()
    method = UPRIGHT.get(read_orientation(image))
    return image if method is None else image.transpose(method)


def convert(image: Image.Image, channels: int, colour: tuple[int, int, int] | None) -> np.ndarray:
    """Convert a loaded image of any mode to uint8 [H, W, channels], writable; colour: from `background_rgb`."""
    if image.mode == "F":
        raise Unsupported("floating-point pixels have no fixed range; save the image with 8 or 16 bits per channel")
    if image.mode == "LAB":
        raise Unsupported("L*a*b* colours; save the image as RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_eight_bit(image, colour)
    elif is_transparent(image) and colour is not None:
        canvas = Image.new("RGBA", image.size, (*colour, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    elif image.mode == "RGBa":
        image = image.convert("RGBA")  # Pillow has no other conversion for premultiplied colours
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # convert copies even if the mode is the same
    pixels = np.array(image)  # a copy: Pillow's own buffer is read-only
    return pixels[:, :, None] if channels == 1 else pixels


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent grey or colour of a PNG to 8 bits, as its pixels will have; Pillow does not.

    For 16 bits, use the high byte, as Pillow does for pixels.
    """
    clear, raw = image.info["transparency"], image.tile[0][3] if image.tile else ""
    if raw in ("L;2", "L;4"):
        top = 2 ** int(raw[2:]) - 1
        image.info["transparency"] = (clear & top) * (255 // top)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 by default."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # any type; the pixels are fine without it, and every viewer shows them
        return 1


def _to_eight_bit(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """Scale 16-bit grey to 8 bits, rounding to nearest (Pillow clips at 255), and replace the transparent level.

    Raises Unsupported for 32-bit integers that do not fit into 16 bits, because their range is unknown.
    """
    pixels = np.asarray(image)
    if pixels.dtype.itemsize > 2 and (pixels.min() < 0 or pixels.max() > 65535):
        raise Unsupported(f"integer pixels from {pixels.min()} to {pixels.max()}; save the image with 8 or 16 bits")
    grey = _TO_EIGHT_BIT[pixels]
    clear = image.info.get("transparency")
    if isinstance(clear, int) and colour is not None:
        coloured = np.repeat(grey[..., None], 3, axis=2)
        coloured[pixels == clear] = colour
        return Image.fromarray(coloured)
    return Image.fromarray(grey)


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image from its embedded ICC profile to sRGB.

    It is unchanged without a profile, with a broken or mismatched profile, or with 16 bits.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("L", "P", "RGB", "RGBA", "CMYK"):
        return image
    if is_transparent(image):
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    try:
        return _srgb_transform(profile, image.mode).apply(image)
    except (ImageCms.PyCMSError, ValueError):
        return image


@functools.lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Return the transform from a profile to sRGB; cached, because building one is slow."""
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    target = "RGBA" if mode == "RGBA" else "RGB"
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target)


def read_upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the height and width of a file after EXIF rotation."""
    return upright_size(read_file(path), os.fspath(path))


def upright_size(content: bytes, name: str) -> tuple[int, int]:
    """Return the height and width after EXIF rotation, from the header; only a PNG is decoded completely.

    Raises UnreadableImage as `Decoder` does, except for damaged pixels.
    """

    def size_of(image: Image.Image) -> tuple[int, int]:
        stored = image.tag_v2 if image.format == "TIFF" else {}  # newer Pillows open a TIFF with its rotated size
        size_hw = stored.get(_HEIGHT, image.height), stored.get(_WIDTH, image.width)
        return size_hw[::-1] if read_orientation(image) in (5, 6, 7, 8) else size_hw

    return open_image(content, name, DEFAULT_MAX_PIXELS, size_of)
