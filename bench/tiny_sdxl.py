"""What the demo of SDXL and the workshop begin with: pictures, and a tiny base model whose VAE has seen such.

python bench/tiny_sdxl.py tones FOLDER                   (make demo-sdxl): shapes/ and orange/, with captions
python bench/tiny_sdxl.py pictures FOLDER                (make workshop): shapes, a tenth of them with tags
python bench/tiny_sdxl.py base FOLDER MINUTES IMAGES     (demos/): a base model whose VAE learns IMAGES so long

The VAE alone is trained, by a plain loop. U-Net and text encoders stay as they are drawn: drawn encoders tell a few
captions apart.
"""

import itertools
import random
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image, ImageDraw, ImageOps
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import RandomCrop

from data.images.decode import Decoder
from data.images.open import read_file
from data.stream.source import UnreadableImage
from data.tools.predictions import list_images
from sdxl.files.checkpoints import save_pipeline
from sdxl.files.family import VAE_SCALING_FACTOR, draw_networks
from sdxl.files.tokenizer import build_tokenizer

Colour = tuple[int, int, int]

COLOURS = {"red": (210, 30, 30), "green": (20, 170, 40), "blue": (30, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("circle", "square", "triangle")
TONES = {"black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255), "orange": (250, 140, 20)}
SIZES_HW = ((128, 128), (96, 160), (160, 96))
CAPTIONS = ["black", "white", "red circle", "green square", "blue triangle", "yellow circle"]
_EACH = 18  # pictures of a combination of words, circles and squares twice
_TAGGED_EVERY = 10  # pictures
_EACH_CAPTION = 48
_READ = 256  # pictures of a folder
_MAX_PIXELS = 100_000_000
_CROP_PX = 64  # parts of pictures that the VAE is trained on
_BATCH = 6
_VAE_LR = 0.03  # the highest
_FIRST_SHARE = 0.02  # of it, for the first update
_LOGVAR = -8.0  # of the VAE's latents: it is not trained, as no loss asks for it


def draw_picture(caption: str, size_hw: tuple[int, int], draw: random.Random) -> Image.Image:
    """Return a plain tone, or a shape of a colour near the middle of a grey ground."""
    if caption in TONES:
        return Image.new("RGB", size_hw[::-1], TONES[caption])
    colour, shape = caption.split()
    return draw_shape(shape, COLOURS[colour], (draw.randint(100, 156),) * 3, size_hw, draw)


def draw_shape(
    shape: str, colour: Colour, ground: Colour, size_hw: tuple[int, int], draw: random.Random
) -> Image.Image:
    """Return a shape of a colour near the middle of a ground of another."""
    height, width = size_hw
    image = Image.new("RGB", (width, height), ground)
    side = min(size_hw) * draw.uniform(0.5, 0.7)
    left, top = (draw.uniform(0.4, 0.6) * (length - side) for length in (width, height))
    right = left + side
    bottom = top + side
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    else:
        pen.polygon((left, bottom, right, bottom, (left + right) / 2, top), fill=colour)
    return image


def write_pictures(folder: Path, captions: list[str], each: int) -> None:
    """Write `each` PNGs for each caption, of several sizes and ratios, with the caption in a .txt file beside it."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for caption in captions:
        for number in range(each):
            scale = draw.uniform(1.0, 1.5)
            height, width = SIZES_HW[number % len(SIZES_HW)]
            name = f"{caption.replace(' ', '_')}_{number}"
            draw_picture(caption, (round(height * scale), round(width * scale)), draw).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(caption)


def write_tones(folder: Path) -> None:
    """Write shapes/, the captioned pictures of a base model, and orange/, a tone that is new to it."""
    write_pictures(folder / "shapes", CAPTIONS, _EACH_CAPTION)
    write_pictures(folder / "orange", ["orange", "black", "white"], _EACH_CAPTION // 2)


def write_tagged(folder: Path) -> None:
    """Write PNGs of coloured shapes on grounds of four tones; each tenth has its tags in a .txt file beside it."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    combinations = list(itertools.product(COLOURS, SHAPES + SHAPES[:2], TONES)) * _EACH
    draw.shuffle(combinations)
    for number, (colour, shape, tone) in enumerate(combinations):
        image = draw_shape(shape, COLOURS[colour], TONES[tone], draw.choice(SIZES_HW), draw)
        image.save(folder / f"{number:04}.png")
        if number % _TAGGED_EVERY == 0:
            (folder / f"{number:04}.txt").write_text(f"{colour}, {shape}, {tone} ground")


def read_pictures(folder: Path) -> list[Image.Image]:
    """Return up to _READ images of a folder, evenly spaced, cropped to one size; without the unreadable ones."""
    paths = list_images(str(folder), "images").paths
    decoder = Decoder(3, _MAX_PIXELS)
    pictures = []
    for path in paths[:: -(-len(paths) // _READ)]:
        with suppress(UnreadableImage):
            picture = Image.fromarray(decoder(read_file(path), str(path)))
            pictures.append(ImageOps.fit(picture, SIZES_HW[0][::-1]))
    return pictures


def write_base(folder: Path, minutes: float, pictures: list[Image.Image]) -> float:
    """Write a tiny SDXL as a folder of diffusers; returns the mean error of its VAE's pictures, of 255.

    The VAE is trained on the pictures, and their latents get mean 0 and deviation 1.
    """
    networks = draw_networks()
    images = to_tensor(pictures)
    error = train_vae(networks["vae"], images, 60 * minutes)
    scale_latents(networks["vae"], images)
    save_pipeline(
        folder, networks, build_tokenizer(), prediction_type="v_prediction", zero_terminal_snr=True,
        dtype=torch.float32, zeros_for_empty_prompt=False,
    )  # fmt: skip
    return error * 127.5


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """Return pictures of one size as a VAE takes them, [N, 3, H, W] from -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1.0


def train_vae(vae: nn.Module, images: Tensor, seconds: float) -> float:
    """Train a VAE so long on crops of images [N, 3, H, W] from -1 to 1; returns the L1 error of its last pictures.

    The encoder learns the mean colour and brightness of 8 x 8 pixels, and the decoder to make pictures of them, noisy
    as a U-Net's latents are. Trained through each other, both would need minutes to find more than brightness.
    """
    torch.manual_seed(0)
    begin_linear(vae)
    optimizer = create_optimizer_v2(vae, opt="muon", lr=_VAE_LR, weight_decay=0.0)
    crop = RandomCrop(_CROP_PX)
    errors = []
    started = time.monotonic()
    while not errors or time.monotonic() < started + seconds:
        share = (time.monotonic() - started) / seconds
        rise = 5 * share + _FIRST_SHARE
        fall = 1.25 - 1.25 * min(share, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _VAE_LR * min(1.0, rise, fall)
        batch = torch.stack([crop(images[number]) for number in torch.randint(len(images), (_BATCH,))])
        means = functional.avg_pool2d(batch, 8)
        latents = torch.cat([means, means.mean(dim=1, keepdim=True)], dim=1)
        error = (vae.decode(latents + 0.1 * torch.randn_like(latents)).sample - batch).abs().mean()
        latent_error = (vae.encode(batch).latent_dist.mode() - latents).abs().mean()
        optimizer.zero_grad()
        (error + latent_error).backward()
        optimizer.step()
        errors.append(error.item())
    return float(np.mean(errors[-10:]))


@torch.no_grad()
def begin_linear(vae: nn.Module) -> None:
    """Zero what residual blocks add, so that a drawn VAE learns fast; its latents have next to no variance."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    vae.quant_conv.weight[4:] = 0.0
    vae.quant_conv.bias[4:] = _LOGVAR


@torch.no_grad()
def scale_latents(vae: nn.Module, images: Tensor) -> None:
    """Give each channel of the latents, times the VAE's scaling factor, mean 0 and deviation 1 on these images.

    The convolutions of 1 x 1 behind the encoder and before the decoder take it up: pictures stay as they are.
    """
    latents = vae.encode(images).latent_dist.mode()
    mean = latents.mean(dim=(0, 2, 3))
    std = latents.std(dim=(0, 2, 3)) * VAE_SCALING_FACTOR
    encoder = vae.quant_conv
    decoder = vae.post_quant_conv
    encoder.weight[:4] /= std[:, None, None, None]
    encoder.bias[:4] = (encoder.bias[:4] - mean) / std
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std[:, None, None]


def main():
    kind, place, *more = sys.argv[1:]
    folder = Path(place)
    if kind == "base":
        minutes, images = more
        error = write_base(folder, float(minutes), read_pictures(Path(images)))
        sys.stdout.write(f"error of the VAE's pictures: {error:.1f} of 255\n")
        return
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed call
    write = {"pictures": write_tagged, "tones": write_tones}[kind]
    write(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
