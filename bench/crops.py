"""How many crops job=duplicates finds among images of one's own, and how many it joins wrongly.

python bench/crops.py FOLDER

Of each image a crop is taken at a random place, mirrored in half of the cases, resized by 0.5 to 1.3 and saved as JPEG
of quality 80. All images and the crops of one share are searched together. A crop is found if it is in a group with its
image. Pairs of different images in one group are joined wrongly, so the folder must not have an image twice.
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageOps

from bench.commands import fail
from data.crops import find_crops
from data.decode import Decoder
from data.duplicates import group_duplicates, perceptual_hash, shrink_to_grey
from data.image_formats import DEFAULT_MAX_PIXELS, read_file
from data.scan import list_images
from utils.text_table import align_columns

SHARES, SIDE_PX = (0.95, 0.9, 0.8), 1024  # of each side; images are shrunk to this longest side first


def read_images(folder: Path) -> list[Image.Image]:
    """Return the images of a folder and of those in it, as job=duplicates decodes them."""
    images, decode = [], Decoder(3, DEFAULT_MAX_PIXELS)
    for listed in sorted(list_images(folder)):
        pixels = decode(read_file(folder / listed.path), listed.path)
        images.append(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
        images[-1].thumbnail((SIDE_PX, SIDE_PX))
    return images


def crop(image: Image.Image, share: float, draws: np.random.Generator, mirror: bool) -> Image.Image:
    """Return a part of an image, of this share of each side, as another site would have it."""
    width, height = (round(share * side) for side in image.size)
    left, top = (int(draws.integers(0, most + 1)) for most in (image.width - width, image.height - height))
    part, zoom = image.crop((left, top, left + width, top + height)), draws.uniform(0.5, 1.3)
    part = part.resize([max(1, round(zoom * side)) for side in part.size], Image.Resampling.BICUBIC)
    (ImageOps.mirror(part) if mirror else part).save(file := io.BytesIO(), "JPEG", quality=80)
    return Image.open(file)


def group(images: list[Image.Image]) -> np.ndarray:
    """Return the group of each image, int64 [N], as job=duplicates deduplicate.match=crop makes them."""
    thumbnails = np.stack([shrink_to_grey(np.asarray(image)) for image in images])
    hashes = np.array([perceptual_hash(thumbnail) for thumbnail in thumbnails], np.int64)
    return group_duplicates(hashes, [find_crops(thumbnails)])


def count_joined(groups: np.ndarray) -> int:
    """Return the pairs of images in one group."""
    sizes = np.unique(groups, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def main() -> None:
    """Measure, and print a table."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        fail("give the folder of your images")
    images, draws = read_images(Path(sys.argv[1])), np.random.default_rng(0)
    if (count := len(images)) < 2:
        fail(f"{sys.argv[1]} has {count} images; give a folder of two or more")
    print(f"{count:,} images, {count * (count - 1) // 2:,} pairs; joined wrongly: {count_joined(group(images)):,}")
    rows = [("of each side", "found", "joined wrongly")]
    for share in SHARES:
        groups = group(images + [crop(image, share, draws, draws.random() < 0.5) for image in images])
        found = (groups[:count] == groups[count:]).mean()
        rows.append((f"{share:.0%}", f"{found:.1%}", str(count_joined(groups[:count]))))
    print(align_columns(rows))


if __name__ == "__main__":
    main()
