"""Complete programs for the README.md of an export: from an image file to predictions, in the library of the format.

Each runs as it stands in the folder of the export, with an image.png in it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from models.outputs import OUTPUTS
from utils.canvas import background_levels, background_of, background_rgb


def _read(metadata: Mapping[str, Any]) -> str:
    """Return the lines that read `image`, upright, on the background that the network was trained with."""
    preprocessing = metadata["preprocessing"]
    colour, mode = background_rgb(background_of(preprocessing)), "L" if preprocessing["channels"] == 1 else "RGB"
    lines = ['image = ImageOps.exif_transpose(Image.open("image.png"))']
    if colour is None:
        lines.append(f'image = image.convert("{mode}")  # leaves transparency out, as in training')
        return "\n".join(lines)
    lines += [
        'image = image.convert("RGBA")',
        f'canvas = Image.new("RGBA", image.size, {(*colour, 255)})  # the background in training',
        f'image = Image.alpha_composite(canvas, image).convert("RGB"){".convert(mode)" if mode == "L" else ""}',
    ]
    return "\n".join(lines).replace("(mode)", '("L")')


def _pad(preprocessing: Mapping[str, Any]) -> str:
    """Return the lines that put `image` into the middle of a square, none where it is not padded."""
    if preprocessing.get("pad", "none") == "none":
        return ""
    levels = background_levels(background_of(preprocessing), preprocessing["channels"])
    return f"""side = max(image.size)
square = Image.new(image.mode, (side, side), {tuple(levels) if len(levels) == 3 else levels[0]})
square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
image = square
"""


# What the programs that read taggers do to every image.
_SQUARE = """side = max(image.size)
square = Image.new("RGB", (side, side), "white")
square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
image = square
"""


def _has_head(metadata: Mapping[str, Any]) -> bool:
    return OUTPUTS[metadata["output"]].activate is not None


def _activation(metadata: Mapping[str, Any]) -> str:
    return "sigmoid()" if metadata["output"] == "tags" else "softmax(-1)"


def timm_snippet(metadata: Mapping[str, Any], file: str) -> str:
    """Return the program for timm."""
    turned = metadata.get("channel_order") == "BGR"
    result = "print(model.forward_features(batch).mean((-2, -1))[0])"
    if _has_head(metadata):
        result = (
            f"probs = model(batch)[0].{_activation(metadata)}\n"
            'names = json.load(open("config.json")).get("label_names") or range(len(probs))\n'
            "print(sorted(zip(probs.tolist(), names), reverse=True)[:5])"
        )
    return f"""import json
import timm
import torch
from PIL import Image, ImageOps

{_read(metadata)}
{_SQUARE if turned else ""}model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
batch = transform(image)[None]{"[:, [2, 1, 0]]  # BGR" if turned else ""}
with torch.inference_mode():
    {result.replace(chr(10), chr(10) + "    ")}
"""


def transformers_snippet(metadata: Mapping[str, Any], file: str) -> str:
    """Return the program for transformers."""
    head = _has_head(metadata)
    network = "ConvNextV2ForImageClassification" if head else "ConvNextV2Model"
    result = "print(model(**batch).last_hidden_state.mean((-2, -1))[0])"
    if head:
        result = (
            f"probs = model(**batch).logits[0].{_activation(metadata)}\n"
            "names = model.config.id2label.values()\n"
            "print(sorted(zip(probs.tolist(), names), reverse=True)[:5])"
        )
    return f"""import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, {network}

{_read(metadata)}
model = {network}.from_pretrained(".").eval()
batch = AutoImageProcessor.from_pretrained(".")(image, return_tensors="pt")
with torch.inference_mode():
    {result.replace(chr(10), chr(10) + "    ")}
"""


def onnx_snippet(metadata: Mapping[str, Any], file: str) -> str:
    """Return the program for ONNX Runtime."""
    preprocessing = metadata["preprocessing"]
    height, width = preprocessing["image_size_hw"]
    interpolation = preprocessing["interpolation"]
    resample = f"Image.Resampling.{'BOX' if interpolation == 'area' else interpolation.upper()}"
    if preprocessing.get("eval_resize", "crop") == "squash":
        resize = f"image = image.resize(({width}, {height}), {resample})"
    else:
        sides = [int(side / preprocessing["eval_crop"]) for side in (width, height)]
        resize = (
            f"factor = max({sides[0]} / image.width, {sides[1]} / image.height)\n"
            "size = [int(side * factor + 1e-6) for side in image.size]\n"
            f"image = image.resize((max({width}, size[0]), max({height}, size[1])), {resample})\n"
            f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)\n"
            f"image = image.crop((left, top, left + {width}, top + {height}))"
        )
    axes = "[None, None]" if preprocessing["channels"] == 1 else ".transpose(2, 0, 1)[None]"
    output = OUTPUTS[metadata["output"]]
    result = "print(outputs[-1][0])"
    if _has_head(metadata):
        result = (
            'metadata = json.loads(session.get_modelmeta().custom_metadata_map["atelier"])\n'
            f'print(sorted(zip(outputs[-1][0].tolist(), metadata["{output.names_key}"]), reverse=True)[:5])'
        )
    return f"""import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{_read(metadata)}
{_pad(preprocessing)}{resize}
batch = (np.asarray(image, np.float32) / 255){axes}
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
outputs = session.run(None, {{"images": batch}})
{result}
"""


def wd14_snippet(metadata: Mapping[str, Any], file: str) -> str:
    """Return the program for ONNX Runtime that prepares an image and reads the tags as programs for taggers do."""
    side = metadata["preprocessing"]["image_size_hw"][0]
    return f"""import csv
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{_read(metadata)}
{_SQUARE}image = image.resize(({side}, {side}), Image.Resampling.BICUBIC)
batch = np.asarray(image, np.float32)[None, :, :, ::-1]  # BGR, 0 to 255
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
probs = session.run(["output"], {{"input": batch}})[0][0].tolist()
rows = list(csv.DictReader(open("selected_tags.csv", encoding="utf-8", newline="")))
rating = rows[max(range(4), key=lambda row: probs[row])]["name"]
tags = [(prob, row["name"]) for prob, row in zip(probs, rows)
        if row["category"] != "9" and prob >= float(row.get("best_threshold", 0.35))]
print({{"rating": rating, "tags": {{name: round(prob, 4) for prob, name in sorted(tags, reverse=True)}}}})
"""


SNIPPETS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "timm": timm_snippet,
    "transformers": transformers_snippet,
    "onnx": onnx_snippet,
    "wd14": wd14_snippet,
}
