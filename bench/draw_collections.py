"""Draw the collections of bench/minutes.py: glyphs and Fashion-MNIST.

    python bench/draw_collections.py [FOLDER]        outputs/bench/collections/NAME/{train,val}/CLASS/*.png

| name | images | classes | kind | validation |
|---|---|---|---|---|
| glyphs | 12,298 | 958 | letters, grey, 32 px | a typeface never seen |
| fashion | 60,000 | 10 | clothes, grey, 28 px | the test images of the dataset |

Needs Debian's package dataset-fashion-mnist. 867acae8 also draws emoji, and a tenth of each collection.
"""

import gzip
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from data.layouts.glyphs import draw_glyphs
from utils.config.help import ROOT

FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot"]


def save(image: Image.Image, folder: Path, split: str, label: str, name: str) -> None:
    """Write one image."""
    path = folder / split / label / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)


def copy_glyphs(folder: Path) -> None:
    """The embedded collection's labelled images; STIX, a typeface that no training sees, validates."""
    with TemporaryDirectory() as drawn:
        root = Path(drawn) / "glyphs"
        draw_glyphs(root)
        table = pq.read_table(root / "manifest.parquet", columns=["path", "label", "split"]).to_pylist()
        rows = [row for row in table if row["label"]]
        labels = sorted({row["label"] for row in rows})
        for row in rows:
            name = row["path"].replace("/", "_").removesuffix(".png")
            with Image.open(root / row["path"]) as image:
                save(image, folder, row["split"], f"{labels.index(row['label']):03d}", name)


def draw_fashion(folder: Path) -> None:
    """The images of the four IDX files."""
    for split, stem in (("train", "train"), ("val", "t10k")):
        images = gzip.decompress((FASHION / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((FASHION / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        for number, label in enumerate(labels[8:]):
            save(Image.fromarray(pixels[number]), folder, split, CLOTHES[label], f"{number:05d}")


DRAW = {"glyphs": copy_glyphs, "fashion": draw_fashion}


def main() -> None:
    """Draw each collection that is not there."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs/bench/collections"
    for name, draw in DRAW.items():
        if not (out / name).exists():
            draw(out / name)
            print(name, *(len(list((out / name / split).glob("*/*.png"))) for split in ("train", "val")))


if __name__ == "__main__":
    main()
