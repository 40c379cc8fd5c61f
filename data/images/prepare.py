"""Prepare image files for a network, as utils/formats/preprocessing.py describes; this needs no torch."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from data.images.decode import Decoder
from data.images.open import read_file
from data.images.resize import resize
from data.stream.source import UnreadableImage
from utils.formats.preprocessing import Decoding, Preprocessing
from utils.io.files import Values

_AHEAD = 4  # images a thread


def decoder_of(preprocessing: Values, max_pixels: int, background: Any = None) -> Decoder:
    """Return the decoder for a preprocessing. background: replaces the background of training; None: keeps it."""
    stated = Decoding.model_validate(preprocessing)
    background = stated.background if background is None else background
    return Decoder(stated.channels, max_pixels, background, stated.shortest_px)


def letterbox(pixels: ndarray, stated: Preprocessing) -> ndarray:
    """Centre the whole image, uint8 [H, W, C], on a square, unless `pad` is none.

    An odd pixel of padding goes to the right or the bottom.
    """
    if stated.pad == "none":
        return pixels
    shrink = stated.longest_px / max(pixels.shape[:2])
    if shrink < 1:
        pixels = resize(pixels, [max(1, round(side * shrink)) for side in pixels.shape[:2]], "bicubic")
    height, width, channels = pixels.shape
    side = max(height, width)
    square = np.full((side, side, channels), stated.levels, np.uint8)
    top = (side - height) // 2
    left = (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def prepare(pixels: ndarray, stated: Preprocessing) -> ndarray:
    """Resize the shorter side to image size / eval_crop, rounded down, and crop the centre; or resize both (`squash`).

    pixels: a decoded image, uint8 [H, W, C]. The pixels equal torchvision's resize and centre crop. Only the middle of
    a very long image is resized, because the whole may exceed the memory.
    """
    size_hw = stated.image_size_hw
    pixels = letterbox(pixels, stated)
    if stated.squashes:
        return resize(pixels, size_hw, stated.interpolation)
    longest = math.ceil(stated.longest_px * min(pixels.shape[:2]) / min(size_hw))
    ends = [max(0, side - longest) // 2 for side in pixels.shape[:2]]
    pixels = pixels[tuple(slice(end, side - end) for end, side in zip(ends, pixels.shape))]
    factor = max(resized / side for resized, side in zip(stated.resized_hw, pixels.shape[:2]))
    # Down, as torchvision; 1e-6: for the side that sets the factor.
    resized_hw = [max(least, int(side * factor + 1e-6)) for least, side in zip(size_hw, pixels.shape[:2])]
    height, width = size_hw
    top, left = (round((resized - side) / 2) for resized, side in zip(resized_hw, size_hw))
    return resize(pixels, resized_hw, stated.interpolation)[top : top + height, left : left + width]


def preparer(preprocessing: Values, max_pixels: int) -> Callable[[bytes, str], ndarray]:
    """Return the function from an encoded image and its name to a network's input, uint8 [C, H, W].

    It raises UnreadableImage.
    """
    decoder = decoder_of(preprocessing, max_pixels)
    stated = Preprocessing.model_validate(preprocessing)
    return lambda content, name: np.ascontiguousarray(prepare(decoder(content, name), stated).transpose(2, 0, 1))


def read_images(paths: Iterable[Path], preprocessing: Values, max_pixels: int, threads: int) -> Iterator[ndarray | str]:
    """Yield each file as an image, uint8 [C, H, W], or the reason why it cannot be read, in order.

    threads: read ahead; 0: a file is read when it is asked for.
    """
    to_input = preparer(preprocessing, max_pixels)

    def read(path: Path) -> ndarray | str:
        try:
            return to_input(read_file(path), str(path))
        except UnreadableImage as error:
            return error.reason

    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = deque()
        for path in paths:
            waiting.append(pool.submit(read, path))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
