"""Milliseconds per image of `data.decode.Decoder` against other decoders, on one thread, from bytes to uint8 [3, H, W].

The files are scikit-learn's two photographs, mirrored at their edges to the size of the setting: their detail, and so
the cost of a pixel, stays that of a photograph. The last setting shrinks to a shorter side of 256 px, as a cache does.
"""

import functools
import io
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode

from bench.measure import Comparison, run_bench
from data.decode import Decoder, decoder_versions, simplejpeg
from data.transforms import resize

REPEATS = {(375, 500): 40, (1536, 2048): 4}  # of each photograph in a turn, by height and width
FORMS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}}
SHORTEST_PX = 256
MAX_PIXELS = 10**8


def files(size_hw, form):
    """Return the photographs as files of a size and format."""
    found = []
    for photo in load_sample_images().images:
        margins = [(0, max(0, wanted - had)) for wanted, had in zip(size_hw, photo.shape)]
        pixels = np.pad(photo, [*margins, (0, 0)], mode="symmetric")[: size_hw[0], : size_hw[1]]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, form, **FORMS[form])
        found.append(stream.getvalue())
    return found


def by_pillow(content):
    """Decode as torchvision's datasets do."""
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def by_torchvision(content):
    """Decode by torchvision's own decoders."""
    return torchvision.io.decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def by_simplejpeg(content):
    """Decode a JPEG by simplejpeg alone."""
    return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)


def shrunk(decode, content):
    """Decode all and resize."""
    image = decode(content)
    short = min(image.shape[1:])
    return resize(image, [side * SHORTEST_PX // short for side in image.shape[1:]], "bilinear")


def comparison(setting, decoders, contents, repeats):
    """Return a comparison of decoders on some files."""

    def turn(decode):
        return [decode(content) for _ in range(repeats) for content in contents]

    sides = {name: functools.partial(turn, decode) for name, decode in decoders.items()}
    facts = {"decoders": decoder_versions(), "torchvision": torchvision.__version__}
    return Comparison(setting, sides, steps=repeats * len(contents), facts=facts, clock=time.process_time)


def comparisons(device, quick):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision")
    ours = Decoder(3, MAX_PIXELS)
    for size_hw, repeats in REPEATS.items():
        for form in FORMS:
            decoders = {"ours": lambda content: ours(content, "x"), "Pillow": by_pillow, "torchvision": by_torchvision}
            if form == "JPEG" and simplejpeg is not None:
                decoders["simplejpeg"] = by_simplejpeg
            contents = files(size_hw, form)
            yield comparison(f"{form} {size_hw[1]} x {size_hw[0]}", decoders, contents, 1 if quick else repeats)
    small = ours._replace(shortest_px=SHORTEST_PX)
    decoders = {"ours": lambda content: small(content, "x")}
    decoders |= {
        "Pillow, resized": functools.partial(shrunk, by_pillow),
        "torchvision, resized": functools.partial(shrunk, by_torchvision),
    }
    yield comparison(f"JPEG to {SHORTEST_PX} px", decoders, files(size_hw, "JPEG"), 1 if quick else repeats)


if __name__ == "__main__":
    run_bench(comparisons)
