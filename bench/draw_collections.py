"""Draw the collections of bench/minutes.py: glyphs, Fashion-MNIST and emoji.

    python bench/draw_collections.py [FOLDER]        outputs/bench/collections/NAME/{train,val}/CLASS/*.png

| name | images | classes | kind | validation |
|---|---|---|---|---|
| glyphs | 12,298 | 958 | letters, grey, 32 px | a typeface never seen |
| fashion | 60,000 | 10 | clothes, grey, 28 px | the test images of the dataset |
| emoji | 1,850 | 9 | drawings in colour by their group, 72 px | a fifth of the meanings |

Needs Debian's packages dataset-fashion-mnist, fonts-noto-color-emoji and unicode-data. NAME_tenth has a tenth of the
training images (at least two of a class), and the same validation.
"""

import gzip
import re
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from data.layouts.glyphs import draw_glyphs
from utils.config.help import ROOT

FASHION = Path("/usr/share/datasets/fashion-mnist")
EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_LIST = "/usr/share/unicode/emoji/emoji-test.txt"
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


def draw_emoji(folder: Path) -> None:
    """Emoji by their group of Unicode, without skin tones; variants of one meaning are in one split."""
    font = ImageFont.truetype(EMOJI_FONT, 109)
    group = ""
    for line in Path(EMOJI_LIST).read_text().splitlines():
        if line.startswith("# group: "):
            group = re.sub(r"\W+", "_", line[9:].lower())
        found = re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.*)", line)
        if found is None or "skin tone" in line or group == "component":
            continue
        codes = found[1].split()
        image = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), "".join(chr(int(c, 16)) for c in codes), font=font, embedded_color=True)
        meaning = found[2] if group == "flags" else re.sub(r"\b(wo)?man\b|\bperson\b|\b(wo)?men\b|people", "", found[2])
        split = "val" if sha256(meaning.strip(" :").encode()).digest()[0] < 51 else "train"
        save(image.resize((72, 68), Image.Resampling.LANCZOS), folder, split, group, "-".join(codes).lower())


DRAW = {"glyphs": copy_glyphs, "fashion": draw_fashion, "emoji": draw_emoji}


def draw_tenth(folder: Path) -> None:
    """Link a tenth of the training images of each class, two at least, and all validation images."""
    tenth = folder.with_name(f"{folder.name}_tenth")
    for label in (folder / "train").iterdir():
        files = sorted(label.iterdir(), key=lambda path: sha256(path.name.encode()).digest())
        for file in files[: max(2, len(files) // 10)]:
            link = tenth / "train" / label.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(file)
    (tenth / "val").symlink_to(folder / "val")


def main() -> None:
    """Draw each collection that is not there."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs/bench/collections"
    for name, draw in DRAW.items():
        if not (out / name).exists():
            draw(out / name)
            draw_tenth(out / name)
            print(name, *(len(list((out / name / split).glob("*/*.png"))) for split in ("train", "val")))


if __name__ == "__main__":
    main()
