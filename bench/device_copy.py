"""What a GPU does for a batch of 128 training images: it cuts them from whole ones, and decodes JPEGs.

python bench/device_copy.py [rows] [quick] [TEXT OF A SETTING]

crops: windows at 224 px, beside a plain copy of one. JPEGs: of 500 x 375, by our decoder on one core of the CPU, beside
nvJPEG, so the ratio is how many cores are as fast. levels: the mean and the largest difference of their pixels. On a
machine without a GPU, torchvision's CPU decoder takes the place of nvJPEG.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from bench.measure import Comparison, repeated, run_bench
from data.images.decode import Decoder
from utils.cut import cut_images


def compare(device, count):
    """Return the comparison, of crops of one image of 500 x 375."""
    content = torch.zeros(2 * 562_500, dtype=torch.uint8, device=device)
    windows = torch.tensor([[0, 1500, 300, 400, 0]] * count, device=device)
    cut = repeated(lambda: cut_images(content, windows, [375, 500, 3], [224, 224], "bicubic"), 20)
    return Comparison({"cut": cut, "copied": repeated(content.clone, 20)}, 20)


def make_jpegs(count):
    """Return the bytes of JPEGs of noise over soft colours, uint8 [bytes] each."""
    torch.manual_seed(0)
    soft = F.interpolate(255 * torch.rand(count, 3, 15, 20), (375, 500), mode="bicubic")
    noisy = soft + 8 * torch.randn_like(soft)
    return [encode_jpeg(image, quality=90) for image in noisy.clamp(0, 255).byte()]


def compare_decoders(device, count):
    """Return the comparison, from bytes to pixels."""
    files = make_jpegs(count)
    decoder = Decoder(3, max_pixels=10**6)

    def ours():
        return [decoder(file.numpy().tobytes(), "made") for file in files]

    def theirs():
        return decode_jpeg(files, ImageReadMode.RGB, device)

    pairs = zip(ours(), theirs())
    differences = torch.stack([(first.float() - second.cpu().float()).abs() for first, second in pairs])
    levels = [round(differences.mean().item(), 3), differences.max().item()]
    return Comparison({"CPU": ours, "nvJPEG": theirs}, steps=count, facts={"levels": levels})


def settings(device, quick):
    """Yield the two settings."""
    count = 2 if quick else 128
    yield "crops at 224 px", lambda: compare(device, count)
    yield "JPEGs", lambda: compare_decoders(device, count)


if __name__ == "__main__":
    run_bench(settings)
