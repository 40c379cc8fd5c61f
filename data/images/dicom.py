"""The picture in a DICOM file, as its window and its photometric interpretation show it."""

import io
from typing import Any

import numpy as np
from PIL import Image

from data.images.further import load_package
from data.images.open import FURTHER_FORMATS, REMARK, Unsupported

_FRAMES = "a DICOM of several frames, whose middle one is read"  # a remark


def read_dicom(content: bytes, max_pixels: int, header: bool) -> Image.Image:
    """Return a picture of 8 bits, grey or RGB: the frame, or the middle one of several. With `header`, it is blank.

    Grey levels go from black to white over the window, the first one of several; without one, over all stored bits.
    Raises Unsupported without a picture, DecompressionBombError above `max_pixels`, and as pydicom does.
    """
    data = load_package("pydicom").dcmread(io.BytesIO(content), stop_before_pixels=header)
    if "Rows" not in data:
        raise Unsupported("a DICOM file without a picture")
    if data.Rows * data.Columns > max_pixels:
        raise Image.DecompressionBombError(f"{data.Columns} x {data.Rows} pixels exceeds")
    frames = int(data.get("NumberOfFrames") or 1)
    pixels = np.zeros((data.Rows, data.Columns), np.uint8) if header else _read_frame(data, frames // 2)
    image = Image.fromarray(pixels)
    image.format = FURTHER_FORMATS["pydicom"]
    image.info = {REMARK: _FRAMES} if frames > 1 else {}
    return image


def _read_frame(data: Any, frame: int) -> np.ndarray:
    """Return the levels of a frame, uint8 [H, W] or [H, W, 3]. Source: DICOM PS3.3 C.7.6.3.1.2, C.11.1, C.11.2."""
    tools = load_package("pydicom").pixels
    pixels = tools.pixel_array(data, index=frame)
    bits = data.BitsStored
    kind = data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = tools.apply_color_lut(pixels, data)
        bits = 8 * pixels.itemsize
    if pixels.ndim == 3:
        return (pixels >> (bits - 8)).astype(np.uint8)
    low = -(2 ** (bits - 1)) if data.PixelRepresentation else 0
    ends = tools.apply_modality_lut(np.array([low, low + 2**bits - 1]), data)
    if "VOILUTSequence" in data:
        ends = 0, 2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
    levels = tools.apply_voi_lut(tools.apply_modality_lut(pixels, data), data)
    colours = (255, 0) if kind == "MONOCHROME1" else (0, 255)
    points = sorted(zip(ends, colours))  # a negative slope turns them round
    return (np.interp(levels, *zip(*points)) + 0.5).astype(np.uint8)
