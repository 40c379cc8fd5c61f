"""Draw the four collections of bench/minutes.py: glyphs, Fashion-MNIST, emoji and textures.

    python bench/four_collections.py [FOLDER]        outputs/bench/collections/NAME/{train,val}/CLASS/*.png

| name | images | classes | kind | validation |
|---|---|---|---|---|
| glyphs | 12,298 | 958 | letters, grey, 32 px | a typeface never seen |
| fashion | 60,000 | 10 | clothes, grey, 28 px | the test images of the dataset |
| emoji | 1,850 | 9 | drawings in colour by their group, 72 px | a fifth of the meanings |
| textures | 6,000 | 24 | drawn surfaces in colour, 96 px | other random draws |

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
TEXTURES_OF_CLASS = 250
TEXTURES_OF_VAL = 50
TEXTURE_PX = 96


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


# ----------------------------------------------------------------------------------------------------------- textures


def noise(rng: np.random.Generator, size: int, slope: float, stretch: float = 1.0) -> np.ndarray:
    """Return random noise [size, size] in 0..1 with a power spectrum of this slope, stretched along one direction."""
    y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    radius = np.hypot(along * stretch, across) + 1 / size
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * radius**-slope).real
    return (field - field.min()) / np.ptp(field)


def texture(kind: int, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return one surface [size, size] in 0..1; kind 0..23: six families of four kinds."""
    family, variant = divmod(kind, 4)
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    period = rng.uniform(7, 16)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    if family == 0:  # clouds: the slope of the spectrum
        return noise(rng, size, (0.6, 1.1, 1.6, 2.1)[variant])
    if family == 1:  # grain: how far it is stretched
        return noise(rng, size, 1.3, (2.0, 4.0, 8.0, 16.0)[variant])
    if family == 2:  # waves: sine, saw, double, bent
        phase = (u / period + (6 * noise(rng, size, 2.0) if variant == 3 else 0)) % 1
        wave = np.sin(2 * np.pi * phase)
        double = np.sin(4 * np.pi * phase)
        return (wave / 2 + 0.5, phase, (wave + double) / 3.6 + 0.5, wave / 2 + 0.5)[variant]
    if family == 3:  # grids: checks, bricks, dots, lines
        p = u / period
        q = v / period
        row = np.floor(q)
        if variant == 0:
            return (np.floor(p) + row) % 2
        if variant == 1:
            return (((p / 2 + row % 2 / 2) % 1 > 0.08) & (q % 1 > 0.14)).astype(float)
        if variant == 2:
            return (np.hypot(p % 1 - 0.5, q % 1 - 0.5) < 0.3).astype(float)
        return ((p % 1 < 0.15) | (q % 1 < 0.15)).astype(float)
    points = rng.uniform(0, size, (int((size / period) ** 2) + 3, 2))
    if family == 4:  # cells: flat, nearest, edges, cones of Manhattan
        gaps = np.abs(np.stack([x, y], -1)[:, :, None] - points)
        far = gaps.sum(-1) if variant == 3 else np.hypot(gaps[..., 0], gaps[..., 1])
        first, second = np.sort(far, -1)[..., :2].transpose(2, 0, 1)
        flat = rng.uniform(0, 1, len(points))[far.argmin(-1)]
        return (flat, first / period, np.clip((second - first) / 3, 0, 1), first / period)[variant]
    return scatter(variant, points, rng, size)


def scatter(variant: int, points: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return discs, rings, squares or strokes at the points."""
    picture = Image.new("L", (size, size))
    draw = ImageDraw.Draw(picture)
    for cx, cy in points:
        radius = rng.uniform(2, 6)
        shade = int(rng.uniform(90, 255))
        turn = rng.uniform(0, np.pi)
        box = (cx - radius, cy - radius, cx + radius, cy + radius)
        if variant == 0:
            draw.ellipse(box, fill=shade)
        elif variant == 1:
            draw.ellipse(box, outline=shade, width=2)
        elif variant == 2:
            draw.regular_polygon((cx, cy, radius), 4, rotation=np.degrees(turn), fill=shade)
        else:
            end = (cx + 2 * radius * np.cos(turn), cy + 2 * radius * np.sin(turn))
            draw.line((cx, cy, *end), fill=shade, width=2)
    return np.asarray(picture) / 255


def draw_textures(folder: Path) -> None:
    """Surfaces between two random colours, with an uneven light, noise and a random contrast."""
    for kind in range(24):
        for number in range(TEXTURES_OF_CLASS + TEXTURES_OF_VAL):
            rng = np.random.default_rng([kind, number])
            value = np.clip(texture(kind, rng, TEXTURE_PX), 0, 1)[..., None] * rng.uniform(0.35, 1.0)
            low, high = rng.uniform(0, 255, (2, 3))
            light = 1 + 0.5 * (noise(rng, TEXTURE_PX, 2.5)[..., None] - 0.5)
            pixels = (low + value * (high - low)) * light + rng.normal(
                0, rng.uniform(4, 24), (TEXTURE_PX, TEXTURE_PX, 1)
            )
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            split = "val" if number < TEXTURES_OF_VAL else "train"
            save(image, folder, split, f"surface_{kind:02d}", f"{number:03d}")


DRAW = {"glyphs": copy_glyphs, "fashion": draw_fashion, "emoji": draw_emoji, "textures": draw_textures}


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
