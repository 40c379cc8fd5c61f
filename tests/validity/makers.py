"""Make the collections of collections.yaml: `python -m tests.validity.makers FOLDER [NAME ...]`."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from numpy import ndarray
from PIL import Image, ImageDraw

from tests.support import draw_shape

Row = dict[str, Any]  # of collections.yaml

CASES: dict[str, Row] = yaml.safe_load(Path(__file__).with_name("collections.yaml").read_text())
_DEFAULTS = {
    "name": "{label}/{code}.jpg", "groups": 120, "each": 1, "labels": ["ill", "well"], "paint": "noise", "tables": {},
    "size": [64, 64], "cells": 8, "tints": [], "turns": 1, "move": 0, "grain": 0, "exif": {},
}  # fmt: skip
_TIME, _MORE, _TAKEN = 0x0132, 0x8769, 0x9003  # tags of EXIF: two places for one time


def _noise(draw: Random, _: str, part: Row) -> ndarray:
    """Return a texture that tells nothing of its label."""
    coarse = np.random.default_rng(draw.getrandbits(32)).integers(40, 216, (part["cells"], part["cells"], 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(part["size"], Image.Resampling.BICUBIC))


def _light(draw: Random, label: str, part: Row) -> ndarray:
    """Return a picture whose light is its label, a number from 0 to 100."""
    return (_noise(draw, label, part) * 0.3 + 1.6 * float(label)).astype(np.uint8)


def _shapes(draw: Random, label: str, _: Row) -> ndarray:
    """Return a shape for each word of the label: a square (a), a disc (b), a cross (c) or stripes."""
    return np.concatenate([draw_shape(word[0].upper(), draw)[:36, :36] for word in label.split()], 1)


def _lines(draw: Random, label: str, _: Row) -> ndarray:
    """Return thin lines on white, with as many corners as the label has letters."""
    image = Image.new("RGB", (96, 96), "white")
    circle = (draw.randint(20, 76), draw.randint(20, 76), 14)
    ImageDraw.Draw(image).regular_polygon(circle, len(label), draw.randint(0, 90), outline="black")
    return np.asarray(image)


def _digit(_: Random, label: str, part: Row) -> ndarray:
    """Return a hand-written digit of scikit-learn, 8 x 8 px."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = digits.images[digits.target == int(label)][part["group"]]
    return np.repeat(chosen.astype(np.uint8)[..., None] * 16, 3, 2)


_PAINT: dict[str, Callable[[Random, str, Row], ndarray]] = {
    "noise": _noise, "light": _light, "shapes": _shapes, "lines": _lines, "digit": _digit,
}  # fmt: skip


def _again(draw: Random, thing: ndarray, number: int, part: Row) -> ndarray:
    """Return a picture of a thing: mirrored, turned, brighter, tinted in places, moved, with other grain."""
    image = Image.fromarray(thing)
    turns = (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(15), image.point(lambda v: v * 1.2))
    pixels = np.array(turns[number % part["turns"]], float)
    for top, end, left, right, colour in part["tints"]:
        pixels[top:end, left:right] += colour
    rng = np.random.default_rng(draw.getrandbits(32))
    pixels = np.roll(pixels, rng.integers(-part["move"], part["move"] + 1, 2), (0, 1))
    return (pixels + rng.normal(0, part["grain"], pixels.shape)).clip(0, 255).astype(np.uint8)


def _encode(pixels: ndarray, ending: str, fields: dict[int, str]) -> bytes:
    """Return the bytes of an image file; fields: of its EXIF, or 0 for the patient of a DICOM file."""
    if ending == ".dcm":
        from tests.data.images.test_dicom import dicom

        return dicom(pixels[..., 0].copy(), PatientID=fields[0])
    exif, stream = Image.Exif(), io.BytesIO()
    exif.update(fields)
    if _TIME in fields:
        exif.get_ifd(_MORE)[_TAKEN] = fields[_TIME]
    Image.fromarray(pixels).save(stream, "PNG" if ending == ".png" else "JPEG", exif=exif)
    return stream.getvalue()


def _write(root: Path, draw: Random, part: Row) -> None:
    """Write the images of a part, and its tables."""
    lines = {name: [",".join(columns)] for name, columns in part["tables"].items()}
    for index in range(part["groups"] * part["each"]):
        group, number = divmod(index, part["each"])
        if number == 0:
            label, code = draw.choice(part["labels"]), f"{draw.getrandbits(32):08x}"
            thing = _PAINT[part["paint"]](draw, label, part | {"group": group})
        date = f"03:{1 + group % 28:02} {group % 24:02}:{group * 7 % 60:02}:{2 * number:02}"
        words = {"label": label, "code": code, "group": group, "number": number, "index": index, "date": date}
        words |= {"other": f"{draw.getrandbits(32):08x}", "coin": draw.randint(0, 1)}
        names = part["name"] if isinstance(part["name"], list) else [part["name"]]
        file = root / names[number % len(names)].format(**words)
        file.parent.mkdir(parents=True, exist_ok=True)
        fields = {tag: text.format(**words) for tag, text in part["exif"].items()}
        file.write_bytes(_encode(_again(draw, thing, number, part), file.suffix, fields))
        for name, columns in part["tables"].items():
            lines[name].append(",".join(columns.values()).format(**words, file=file.name))
    for name, rows in lines.items():
        (root / name).write_text("\n".join(rows))


def make(name: str, root: Path) -> Row:
    """Write a collection into a folder and return its row."""
    draw = Random(name)
    for part in CASES[name]["parts"]:
        _write(root, draw, _DEFAULTS | part)
    return CASES[name]


if __name__ == "__main__":
    for one in sys.argv[2:] or CASES:
        make(one, Path(sys.argv[1], one))
