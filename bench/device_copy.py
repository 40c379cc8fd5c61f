"""What it costs a GPU to cut a batch of 128 training images from whole ones, beside a plain copy of one.

python bench/device_copy.py [rows] [quick] [TEXT OF A SETTING]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import Comparison, repeated, run_bench
from utils.cut import cut_images


def compare(device, count):
    """Return the comparison, of crops of one image of 500 x 375."""
    content = torch.zeros(2 * 562_500, dtype=torch.uint8, device=device)
    windows = torch.tensor([[0, 1500, 300, 400, 0]] * count, device=device)
    cut = repeated(lambda: cut_images(content, windows, [375, 500, 3], [224, 224], "bicubic"), 20)
    return Comparison({"cut": cut, "copied": repeated(content.clone, 20)}, 20)


def settings(device, quick):
    """Yield the one setting."""
    count = 2 if quick else 128
    yield "crops at 224 px", lambda: compare(device, count)


if __name__ == "__main__":
    run_bench(settings)
