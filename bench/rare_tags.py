"""Taggers with rare tags, with positives that are missing, and with labels that are unknown: heads on frozen features.

npm pack --pack-destination FOLDER emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojilib@4.0.3 \
    @mdi/font@7.4.47 @mdi/svg@7.4.47 @tabler/icons@3.52.0 @tabler/icons-webfont@3.49.0
for file in FOLDER/*.tgz; do mkdir "${file%.tgz}"; tar xzf $file -C "${file%.tgz}"; done
python bench/rare_tags.py folder=FOLDER weights=LITE0 collection=emoji part=labels arms=bce,rfs:0.03,pw:0.03
python bench/rare_tags.py folder=FOLDER weights=LITE0 collection=emoji part=labels drop=0.4 arms=bce,asl,hill,splc
python bench/rare_tags.py folder=FOLDER weights=LITE0 collection=emoji part=unknown

weights: a state of timm's tf_efficientnet_lite0.in1k. The head has two layers on 320 principal components of features
at 64 px; it is trained for 400 updates of 128. Prints mAP of all tags and of those on fewer than 50 training images.

| collection | tags | judged on |
|---|---|---|
| glyphs | the words of the names, on DejaVuSans | STIXGeneral |
| tabler, mdi | the words of the names, aliases and keywords of icons | a quarter of the icons |
| emoji | emojilib's keywords, on two makers' drawings | a quarter of the emoji |

| arm | what it is |
|---|---|
| bce | the loss of the program |
| rfs:t | the same; an image is read max(1, sqrt(t / frequency)) times, by its rarest tag (Gupta et al. 2019, LVIS) |
| pw:t | the same; a positive counts max(1, sqrt(t / frequency)) |
| asl | the asymmetric loss of the program |
| hill, splc | Zhang et al. 2021 (arXiv 2112.07368): lambda 1.5; tau 0.6 after the first epoch; margin 1, gamma 2 |

drop: the share of positives that training images lose. part=unknown: half of the images know half of the tags, the
other half the others. `first` is trained on what is known; the others go on from it, or learn from its probabilities
from scratch.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

from bench.measure import read_group
from data.layouts.glyphs import draw_glyphs
from engine.tasks.config import TaggingTaskConfig
from engine.tasks.tag_losses import bce, prior_bias, tag_loss

SIDE, BATCH, COMPONENTS, WIDTH = 64, 128, 320, 512
LEAST, LEAST_VAL, RARE = 8, 2, 50  # images of a tag
LR, MARGIN, GAMMA, LAMBDA, TAU = 0.004, 1.0, 2.0, 1.5, 0.6


def is_val(text):
    """Return whether a quarter of the texts has this one."""
    return hashlib.sha256(text.encode()).digest()[0] < 64


def draw_icon(font, code):
    """Return an icon of a font, black on white."""
    image = Image.new("L", (SIDE, SIDE), 255)
    left, top, right, bottom = font.getbbox(chr(int(code, 16)))
    place = ((SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
    ImageDraw.Draw(image).text(place, chr(int(code, 16)), 0, font=font)
    return image


def read_json(file):
    """Return the content of a file."""
    return json.loads(file.read_text())


def mdi(folder):
    """Yield images, tags, and whether they are judged."""
    fonts = folder / "mdi-font-7.4.47/package/fonts"
    font = ImageFont.truetype(str(fonts / "materialdesignicons-webfont.ttf"), 60)
    for icon in read_json(folder / "mdi-svg-7.4.47/package/meta.json"):
        words = " ".join([icon["name"], *icon["aliases"]]).replace("-", " ").split()
        yield (
            draw_icon(font, icon["codepoint"]),
            {*words, *(f"tag_{tag}" for tag in icon["tags"])},
            is_val(icon["name"]),
        )


def tabler(folder):
    """Yield images, tags, and whether they are judged."""
    fonts = folder / "tabler-icons-webfont-3.49.0/package/dist/fonts"
    font = ImageFont.truetype(str(fonts / "tabler-icons.ttf"), 60)
    for icon in read_json(folder / "tabler-icons-3.52.0/package/icons.json").values():
        if "outline" in icon["styles"]:
            words = {*map(str, icon["tags"]), *icon["name"].split("-"), f"in_{icon['category']}"}
            yield draw_icon(font, icon["styles"]["outline"]["unicode"]), words, is_val(icon["name"])


def emoji(folder):
    """Yield images, tags, and whether they are judged."""
    words = read_json(folder / "emojilib-4.0.3/package/dist/emoji-en-US.json")
    words = {key.replace("\ufe0f", ""): value for key, value in words.items()}
    for maker in ("google", "twitter"):
        package = folder / f"emoji-datasource-{maker}-16.0.0/package"
        for row in read_json(package / "emoji.json"):
            code = "".join(chr(int(part, 16)) for part in row["unified"].split("-")).replace("\ufe0f", "")
            if row[f"has_img_{maker}"]:
                image = Image.open(package / "img" / maker / "64" / row["image"]).convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                ground.alpha_composite(image)
                tags = {*words.get(code, []), f"in_{row['category']}", f"in_{row['subcategory']}"}
                yield ground.convert("RGB"), tags, is_val(row["unified"])


def glyphs(folder):
    """Yield images, tags, and whether they are judged."""
    root = folder / "glyphs"
    draw_glyphs(root)
    for row in pq.read_table(root / "manifest.parquet").to_pylist():
        face = row["path"].split("/")[-2]
        if face in ("DejaVuSans", "STIXGeneral") and row["tags"]:
            yield Image.open(root / row["path"]).convert("L"), set(row["tags"]), face == "STIXGeneral"


def read_collection(name, folder, weights):
    """Return features and targets to train on and to judge, from a file beside the packages if it is there."""
    file = folder / f"{name}.npz"
    if not file.exists():
        rows = list({"mdi": mdi, "tabler": tabler, "emoji": emoji, "glyphs": glyphs}[name](folder))
        trained, judged = (Counter(tag for row in rows if row[2] == val for tag in row[1]) for val in (False, True))
        names = sorted(tag for tag in trained if trained[tag] >= LEAST and judged[tag] >= LEAST_VAL)
        tags = np.array([[name in row[1] for name in names] for row in rows])
        val = np.array([row[2] for row in rows])
        features = extract([row[0].convert("RGB").resize((SIDE, SIDE)) for row in rows], weights)
        used = tags.any(1)
        np.savez(file, features=project(features[used], val[used]), tags=tags[used], val=val[used])
    saved = np.load(file)
    x, y, val = (torch.from_numpy(saved[key]) for key in ("features", "tags", "val"))
    return x[~val], y[~val].float(), x[val], y[val].numpy()


@torch.inference_mode()
def extract(images, weights):
    """Return the features of images, [N, 1280]."""
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    network.load_state_dict({key: value for key, value in torch.load(weights).items() if "classifier" not in key})
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    return torch.cat([network(part / 127.5 - 1) for part in pixels.split(BATCH)])


def project(features, val):
    """Return principal components of standardised features; all is fitted to training images."""
    fitted = features[torch.from_numpy(~val)]
    scaled = [(part - fitted.mean(0)) / (fitted.std(0) + 1e-3) for part in (features, fitted)]
    basis = torch.svd_lowrank(scaled[1], q=COMPONENTS, niter=2)[2]
    return (scaled[0] @ basis / (scaled[1] @ basis).std()).numpy()


def focal_margin(logits):
    """Return the loss of a positive."""
    return -((MARGIN - logits).sigmoid() ** GAMMA) * F.logsigmoid(logits - MARGIN)


def hill(logits, targets):
    """Return the Hill loss."""
    probs = logits.sigmoid()
    return targets * focal_margin(logits) + (1 - targets) * (LAMBDA - probs) * probs**2


def splc(logits, targets, corrects):
    """Return the loss with self-paced correction, which takes probable negatives for positives."""
    is_found = (logits.detach().sigmoid() > TAU) & (targets == 0) & corrects
    negative = -(logits.sigmoid() ** GAMMA) * F.logsigmoid(-logits)
    found = -((-logits).sigmoid() ** GAMMA) * F.logsigmoid(logits)
    return torch.where(targets == 1, focal_margin(logits), torch.where(is_found, found, negative))


def repeat_factors(targets, limit):
    """Return the factor of each tag, [T]."""
    return (limit / targets.nanmean(0).clamp(min=1e-6)).sqrt().clamp(min=1)


def draw_rows(repeats, generator):
    """Yield batches of rows, which occur as often as `repeats` says, in the mean."""
    stream = torch.empty(0, dtype=torch.long)
    while True:
        while len(stream) < BATCH:
            counts = (repeats + torch.rand(len(repeats), generator=generator)).long()
            rows = torch.arange(len(repeats)).repeat_interleave(counts)
            stream = torch.cat([stream, rows[torch.randperm(len(rows), generator=generator)]])
        yield stream[:BATCH]
        stream = stream[BATCH:]


def train(x, targets, arm, seed, steps, start=None, answers=None, keep=0.0):
    """Return a head. targets: NaN where unknown; there, `answers` [N, T] are targets with the weight `keep`."""
    name, _, limit = arm.partition(":")
    torch.manual_seed(seed)
    head = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(COMPONENTS, WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(WIDTH, targets.shape[1])
    )
    nn.init.trunc_normal_(head[-1].weight, std=0.01)
    head[-1].bias.data.copy_(prior_bias(targets.nanmean(0)))
    head.load_state_dict(head.state_dict() if start is None else start)
    factors = repeat_factors(targets, float(limit or 0))
    repeats = torch.where(targets == 1, factors, 1.0).amax(1) if name == "rfs" else torch.ones(len(x))
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
    asymmetric = read_group(TaggingTaskConfig, "task", "tagging").loss.model_copy(update={"name": "asl"})
    for step, rows in zip(range(steps), draw_rows(repeats, torch.Generator().manual_seed(seed))):
        known = ~targets[rows].isnan()
        wanted = targets[rows].nan_to_num() if answers is None else targets[rows].where(known, answers[rows])
        logits = head(x[rows])
        if name == "hill":
            losses = hill(logits, wanted)
        elif name == "splc":
            losses = splc(logits, wanted, step * BATCH >= len(x))
        elif name == "asl":
            losses = tag_loss(asymmetric, logits, wanted)
        else:
            losses = bce(logits, wanted) * torch.where((wanted == 1) & (name == "pw"), factors, 1.0)
        (losses * torch.where(known, 1.0, keep)).sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return head.eval()


@torch.inference_mode()
def measure(head, x, hits, is_rare):
    """Return mAP of all tags and of rare tags."""
    order = np.argsort(-head(x).numpy(), axis=0, kind="stable")
    ranked = np.take_along_axis(hits, order, 0)
    precision = ranked.cumsum(0) / np.arange(1, len(ranked) + 1)[:, None]
    found = (precision * ranked).sum(0) / ranked.sum(0)
    return found.mean(), found[is_rare].mean()


def heads_of(part, words, x, y, seed):
    """Yield the name of each arm, and its head."""
    steps = int(words["steps"])
    draw = torch.Generator().manual_seed(seed)
    if part == "labels":
        targets = y * (torch.rand(y.shape, generator=draw) >= float(words["drop"]))
        for arm in words["arms"].split(","):
            yield arm, train(x, targets, arm, seed, steps)
        return
    is_half = (torch.rand(len(y), 1, generator=draw) < 0.5) == (torch.rand(y.shape[1], generator=draw) < 0.5)
    targets = y.where(~is_half, torch.nan)
    first = train(x, targets, "bce", seed, steps)
    yield "first", first
    start = first.state_dict()
    with torch.inference_mode():
        answers = first(x).sigmoid()
    yield "unknown", train(x, targets, "bce", seed + 100, steps, start)
    yield "keep_old 0.3", train(x, targets, "bce", seed + 100, steps, start, answers.clone(), 0.3)
    yield "file, from first", train(x, targets, "bce", seed + 100, steps, start, answers.clone(), 1.0)
    yield "file, from scratch", train(x, targets, "bce", seed + 100, steps, None, answers.clone(), 1.0)


def main() -> None:
    """Print a row for each seed and arm."""
    words = {"steps": "400", "seeds": "0,1,2", "drop": "0", "arms": "bce"} | dict(w.split("=") for w in sys.argv[1:])
    torch.set_num_threads(1)
    x, y, judged_x, hits = read_collection(words["collection"], Path(words["folder"]), words["weights"])
    is_rare = (y.sum(0) < RARE).numpy()
    print(words["collection"], len(x), "and", len(judged_x), "images,", len(is_rare), "tags,", is_rare.sum(), "rare")
    for seed in map(int, words["seeds"].split(",")):
        for arm, head in heads_of(words["part"], words, x, y, seed):
            print(
                seed, f"{arm:20}", *(f"{figure:.4f}" for figure in measure(head, judged_x, hits, is_rare)), flush=True
            )


if __name__ == "__main__":
    main()
