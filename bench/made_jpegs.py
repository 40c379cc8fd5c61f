"""Make large JPEGs to measure the loader with, where no photographs may be shipped.

python bench/made_jpegs.py FOLDER [count=400]

Each has 1 to 2.6 megapixels: soft noise with ellipses, rectangles and grain, saved at quality 90 (0.6 MB). They lie in
ten class folders; the same numbers give the same files.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES, QUALITY, SHAPES = 10, 90, 30


def make_image(generator):
    """Return one image."""
    width, height = (int(side) for side in generator.integers(1000, 1600, size=2))
    coarse = generator.integers(0, 256, size=(height // 60, width // 60, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number in range(SHAPES):
        left, top = int(generator.integers(0, width)), int(generator.integers(0, height))
        box = [left, top, left + int(generator.integers(20, 400)), top + int(generator.integers(20, 400))]
        color = tuple(int(level) for level in generator.integers(0, 256, size=3))
        (draw.ellipse if number % 2 else draw.rectangle)(box, fill=color)
    grain = generator.normal(0.0, 6.0, size=(height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def main():
    words = sys.argv[1:]
    if not 1 <= len(words) <= 2 or (len(words) == 2 and not words[1].removeprefix("count=").isdigit()):
        sys.exit("python bench/made_jpegs.py FOLDER [count=400]")
    folder, count = Path(words[0]), int(words[1].removeprefix("count=")) if len(words) == 2 else 400
    for number in range(count):
        file = folder / f"class_{number % CLASSES}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        make_image(np.random.default_rng(number)).save(file, quality=QUALITY)
    sys.stdout.write(f"{count} images in {folder}\n")


if __name__ == "__main__":
    main()
