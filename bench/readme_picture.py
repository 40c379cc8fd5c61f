"""Draw docs/images/results.png, the picture of README: what a classifier, a tagger and a LoRA give.

    python bench/draw_collections.py FOLDER                  emoji/ by group, among others
    python bench/readme_picture.py draw FOLDER               tags/, shapes/ and subject/ beside it
    cd FOLDER                                                ATELIER is this repository
    python ATELIER/train.py data.root=emoji loop.minutes=4 run_dir=classes
    python ATELIER/predict.py weights=classes input=emoji/val output=classes.jsonl
    python ATELIER/train.py task=tagging data.root=tags loop.minutes=5 run_dir=tagger task.min_count=10
    python ATELIER/evaluate.py run_dir=tagger calibrate=true
    python ATELIER/predict.py weights=tagger input=tags/val output=tags.jsonl
    python ATELIER/bench/tiny_sdxl.py base base 1.5 shapes
    S="experiment=sdxl/demo task.buckets.areas_px=[4096] task.buckets.min_px=32 task.samples.image_size_hw=[64,64]"
    S="$S task.samples.guidance=1.5"
    python ATELIER/finetune_sdxl.py $S optim.lr=3e-3 data.root=shapes run_dir=sdxl model.path=base loop.total_steps=2200
    python ATELIER/export.py format=diffusers run_dir=sdxl
    python ATELIER/finetune_sdxl.py $S optim.lr=5e-3 data.root=subject run_dir=lora model.path=sdxl/export/diffusers \
        loop.total_steps=500 task.lora='{kind:lora,factor:-1,rank:32,alpha:32.0,targets:[unet.*]}' \
        task.samples.prompts='["sks, black ground","sks, grey ground","sks, white ground"]'
    cd ATELIER && python bench/readme_picture.py join FOLDER

Images of a split are shown in the order of a hash of their names, so nobody chooses them.
"""

import itertools
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
from matplotlib.figure import SubFigure
from PIL import Image, ImageDraw

from bench.draw_collections import EMOJI_LIST
from bench.tiny_sdxl import COLOURS, SHAPES, TONES, draw_shape
from utils.config.help import ROOT

GROUNDS = ("black", "grey", "white")
NO_TAGS = {"and", "with", "for", "the", "not", "button", "flags", "symbols", "objects", "activities"}
RARE = 14  # words on fewer emoji are no tags
EACH = 28  # pictures of a colour, shape and ground
SIDE = 64


def draw_tags(folder: Path) -> None:
    """Copy the emoji with the words of their names and groups beside them."""
    lines = re.findall(
        r"^([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.*)", Path(EMOJI_LIST).read_text(), re.MULTILINE
    )
    names = {"-".join(codes.split()).lower(): name for codes, name in lines}
    words = {}
    for path in sorted((folder / "emoji").rglob("*.png")):
        group = path.parent.name
        text = "flag" if group == "flags" else f"{group} {names[path.stem]}".replace("_", " ")
        words[path] = set(re.findall("[a-z]{3,}", text.lower())) - NO_TAGS
    counts = Counter(itertools.chain(*words.values()))
    for path, own in words.items():
        target = folder / "tags" / path.parent.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if tags := sorted(word for word in own if counts[word] >= RARE):
            shutil.copy(path, target)
            target.with_suffix(".txt").write_text(", ".join(tags))


def draw_shapes(folder: Path) -> None:
    """Draw captioned shapes for a base model, and 15 pictures of a ball with a core that it has not seen."""
    draw = random.Random(0)
    for name in ("shapes", "subject"):
        (folder / name).mkdir()
    for number, words in enumerate(list(itertools.product(COLOURS, SHAPES, GROUNDS)) * EACH):
        colour, shape, ground = words
        image = draw_shape(shape, COLOURS[colour], TONES[ground], (SIDE, SIDE), draw)
        write(image, folder / f"shapes/{number:04}.png", f"{colour} {shape}, {ground} ground")
    for number in range(15):
        ground = GROUNDS[number % len(GROUNDS)]
        write(draw_subject(TONES[ground], draw), folder / f"subject/{number:02}.png", f"sks, {ground} ground")


def draw_subject(ground: tuple[int, int, int], draw: random.Random) -> Image.Image:
    """Return an orange ball with a violet core."""
    image = Image.new("RGB", (8 * SIDE, 8 * SIDE), ground)
    radius = 8 * SIDE * draw.uniform(0.28, 0.34)
    middle = tuple(8 * SIDE * draw.uniform(0.42, 0.58) for _ in "xy")
    pen = ImageDraw.Draw(image)
    pen.circle(middle, radius, fill=(250, 140, 20))
    pen.circle(middle, radius / 2, fill=(90, 30, 140))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write(image: Image.Image, path: Path, caption: str) -> None:
    """Write an image with its caption beside it."""
    image.save(path)
    path.with_suffix(".txt").write_text(caption)


def read_rows(file: Path, number: int) -> list[dict]:
    """Return so many predictions, in the order of a hash of their files' names."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: sha256(Path(row["path"]).name.encode()).digest())[:number]


def show(part: SubFigure, title: str, images: list[Image.Image], describe: Callable, shape: tuple[int, int]) -> None:
    """Show images in rows and columns, with what `describe` says of each number: text and colour."""
    part.suptitle(title, fontsize=10, weight="bold", x=0.02, ha="left")
    for number, (place, image) in enumerate(zip(part.subplots(*shape).flat, images, strict=True)):
        place.imshow(image)
        place.set(xticks=[], yticks=[])
        place.spines[:].set_color("#ccc")
        text, colour = describe(number)
        place.set_xlabel(text, color=colour, fontsize=8)


def join(folder: Path) -> None:
    """Write the picture."""
    figure = plt.figure(figsize=(11, 6.2), dpi=110)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    classes = read_rows(folder / "classes.jsonl", 18)
    labels = [Path(row["path"]).parent.name for row in classes]

    def judge(number: int) -> tuple[str, str]:
        row = classes[number]
        return f"{row['class'].split('_')[0]} {row['prob']:.2f}", "green" if row["class"] == labels[
            number
        ] else "crimson"

    opened = [Image.open(row["path"]) for row in classes]
    show(upper, "train.py loop.minutes=4: classes of images that it has not seen (red: wrong)", opened, judge, (2, 9))
    left, right = lower.subfigures(1, 2, width_ratios=(1.25, 1))
    tags = [row for row in read_rows(folder / "tags.jsonl", 40) if row["tags"] != "flag"][:10]
    texts = [row["tags"].replace(", ", "\n", 2) for row in tags]
    opened = [Image.open(row["path"]) for row in tags]
    show(left, "task=tagging: tags of such images", opened, lambda number: (texts[number], "black"), (2, 5))
    sheets = [Image.open(folder / f"lora/plots/{name}.png") for name in ("samples_before", "samples")]
    rows = [Image.open(folder / f"subject/{number:02}.png") for number in range(3)]
    rows += [sheet.crop((SIDE * n, 0, SIDE * n + SIDE, SIDE)) for sheet in sheets for n in range(3)]
    title = "finetune_sdxl.py, a tiny SDXL:\n3 of 15 pictures; drawn before, after the LoRA"
    show(right, title, rows, lambda number: ("", "black"), (3, 3))
    figure.savefig(ROOT / "docs/images/results.png")


def main():
    action, place = sys.argv[1:]
    folder = Path(place)
    if action == "draw":
        draw_tags(folder)
        draw_shapes(folder)
    else:
        join(folder)


if __name__ == "__main__":
    main()
