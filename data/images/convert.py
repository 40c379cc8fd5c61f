"""Convert the pixels of any image mode to 8 bits, upright, on a background."""

import numpy as np
from PIL import Image

from data.images.open import ORIENTATION, Unsupported

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
_PHOTOMETRIC = 0x0106  # a tag of TIFF
_WHITE_IS_ZERO = 0


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent colour."""
    return image.mode in _ALPHA or "transparency" in image.info


def load_upright(image: Image.Image) -> Image.Image:
    """Decode an opened image and apply EXIF rotation.

    Pillow's TIFF reader already rotates when loading, and removes the orientation.
    """
    box = image.tile[0][1] if image.format == "GIF" and image.tile else None
    image.load()
    if box not in (None, (0, 0, *image.size)):  # outside its first frame, a GIF is transparent, as browsers have it
        frame = image.convert("RGBA").crop(box)
        image = Image.new("RGBA", image.size)
        image.paste(frame, box)
    if image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        image = Image.fromarray(65535 - np.asarray(image).astype(np.uint16))
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
    elif is_transparent(image) and colour:
        canvas = Image.new("RGBA", image.size, (*colour, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    elif image.mode == "RGBa":
        image = image.convert("RGBA")  # Pillow has no other conversion for premultiplied colours
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # convert copies even if the mode is the same
    pixels = np.array(image)  # a copy: Pillow's own buffer is read-only
    return pixels[:, :, None] if channels == 1 else pixels


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 by default; the decoder of JPEG XL rotates, unless the file has a JPEG inside."""
    if image.format == "JXL" and not image.jpeg:
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # any type; the pixels are fine without it, and every viewer shows them
        return 1


def _to_eight_bit(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """Take the high byte of 16-bit grey, as browsers do, and Pillow for colours; replace the transparent level.

    Raises Unsupported for 32-bit integers that do not fit into 16 bits, because their range is unknown.
    """
    pixels = np.asarray(image)
    if pixels.dtype.itemsize > 2 and (pixels.min() < 0 or pixels.max() > 65535):
        raise Unsupported(f"integer pixels from {pixels.min()} to {pixels.max()}; save the image with 8 or 16 bits")
    grey = (pixels >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int) and colour:
        coloured = np.repeat(grey[..., None], 3, axis=2)
        coloured[pixels == clear] = colour
        return Image.fromarray(coloured)
    return Image.fromarray(grey)
