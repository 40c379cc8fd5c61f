"""Complete programs for the README.md of an export: from an image file to predictions, in the library of the format.

Each runs unchanged in the folder of the export, with an image.png in it. The .txt files in this folder are
string.Templates of the programs, and this module fills in what depends on the weights.
"""

from pathlib import Path
from string import Template

from models.outputs import OUTPUTS
from utils.formats.preprocessing import Preprocessing
from utils.io.files import Values

_OPEN = 'image = Image.open("image.png")'
_DRAFT = """whole = image.size
image.draft(None, ($shortest_px, $shortest_px))  # a JPEG is decoded at a smaller scale"""
_UPRIGHT = "image = ImageOps.exif_transpose(image)"
_TO_EIGHT_BITS = """if image.mode.startswith("I"):  # grey of 16 bits
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))"""
_ON_BACKGROUND = """image = image.convert("RGBA")
canvas = Image.new("RGBA", image.size, $colour)  # the background in training
image = Image.alpha_composite(canvas, image).convert("RGB").convert("$mode")"""
_WITHOUT_ALPHA = 'image = image.convert("$mode")  # drops transparency, as in training'
_SHRINK = """short, long = sorted(whole)
if short > $shortest_px:  # as in training
    long = int($shortest_px * long / short)
    size = (long, $shortest_px) if image.width >= image.height else ($shortest_px, long)
    image = image.resize(size, Image.Resampling.BILINEAR)"""
_PAD = """scale = $longest_px / max(image.size)
if scale < 1:
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
side = max(image.size)
square = Image.new(image.mode, (side, side), $levels)
square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
image = square"""
_SQUASH = "image = image.resize(($width, $height), $resample)"
_CROP = """factor = max($resized_width / image.width, $resized_height / image.height)
size = [int(side * factor + 1e-6) for side in image.size]
image = image.resize((max($width, size[0]), max($height, size[1])), $resample)
left, top = round((image.width - $width) / 2), round((image.height - $height) / 2)
image = image.crop((left, top, left + $width, top + $height))"""


def image_program(template: str, metadata: Values, file: str) -> str:
    """Return the program that predicts with an image network in the exported file."""
    output = OUTPUTS[metadata["output"]]
    stated = Preprocessing.model_validate(metadata["preprocessing"])
    values = {
        "read": read_image(stated),
        "resize": resize_image(stated),
        "file": file,
        "axes": "[None, None]" if stated.channels == 1 else ".transpose(2, 0, 1)[None]",
        "turn": "[:, [2, 1, 0]]  # BGR" if output.has_tags else "",  # as timm's taggers (engine/exports/formats.py)
        "activation": ".sigmoid()" if output.has_tags else ".softmax(-1)",
        "names_key": output.names_key,
    }
    name = template if output.activate is not None else f"{template}_features"
    return Template((Path(__file__).parent / f"{name}.txt").read_text("utf-8")).substitute(values)


def read_image(stated: Preprocessing) -> str:
    """Return the lines that read `image`: upright, on the background of the training, shrunk and padded as there."""
    parts = [_OPEN, _UPRIGHT, _TO_EIGHT_BITS, _WITHOUT_ALPHA if stated.colour is None else _ON_BACKGROUND]
    if stated.shortest_px is not None:
        parts.insert(1, _DRAFT)
        parts.append(_SHRINK)
    if stated.pad == "square":
        parts.append(_PAD)
    is_grey = stated.channels == 1
    values = {"shortest_px": stated.shortest_px, "longest_px": stated.longest_px, "mode": "L" if is_grey else "RGB"}
    values["colour"] = (*(stated.colour or ()), 255)
    values["levels"] = stated.levels[0] if is_grey else tuple(stated.levels)
    return Template("\n".join(parts)).substitute(values)


def resize_image(stated: Preprocessing) -> str:
    """Return the lines that resize `image`, for libraries that do not."""
    height, width = stated.image_size_hw
    resized_height, resized_width = stated.resized_hw
    values = {
        "height": height,
        "width": width,
        "resized_height": resized_height,
        "resized_width": resized_width,
        "resample": f"Image.Resampling.{stated.interpolation.upper()}",
    }
    return Template(_SQUASH if stated.squashes else _CROP).substitute(values)
