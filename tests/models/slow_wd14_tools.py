"""The exports of a tagger in the programs that read them: the same tags as the network itself gives in PyTorch.

imgutils and timm run as they are; imgutils in an environment of its own (`make install-interop`). What
kohya-ss/sd-scripts and pythongosssss/ComfyUI-WD14-Tagger, which are no packages, do to images and probabilities is
written down here. No program resizes as another does, so tags are equal on images of the file's size, and nearly so on
others.
"""

import csv
import json
import subprocess

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from tests.models.test_export_formats import geometry
from tests.models.test_tag_exports import open_tagger
from tests.support import ROOT, export, thresholds_of
from utils.thresholds import PER_TAG
from utils.vocabulary import CHARACTER, GENERAL, RATING, Vocabulary

INTEROP = ROOT / ".venv-interop/bin/python"
SIDE = 448
SPECIAL = ["^_^", "<o>_<o>", 'don\'t_say_"lazy"', "a,b", "hat_(x)", "1girl"]
GENERALS = [*SPECIAL, *(f"tag_{number}" for number in range(120))]
CHARACTERS = [f"name_{number}_(series)" for number in range(40)]
KEYS = [(RATING, "explicit"), *((GENERAL, name) for name in GENERALS), (1, "artist"), (3, "copyright"),
        (RATING, "general"), *((CHARACTER, name) for name in CHARACTERS), (RATING, "questionable"),
        (GENERAL, "appended")]  # fmt: skip
COUNTS = np.random.default_rng(0).permutation(len(KEYS)) + 1
VOCABULARY = Vocabulary(
    tuple(name for _, name in KEYS), tuple(category for category, _ in KEYS), tuple(COUNTS.tolist()),
    tuple(range(len(KEYS))),
)  # fmt: skip
ORDER = sorted(range(len(KEYS)), key=lambda row: -COUNTS[row])  # the order of the tags within a category
THRESHOLDS = thresholds_of(VOCABULARY, {GENERAL: 0.3, CHARACTER: 0.8}, {(GENERAL, name): 0.6 for name in GENERALS[::2]})


def make_tagger():
    """Return a small tagger whose probabilities spread, as export.py opens it."""
    model, metadata = open_tagger(geometry(), SIDE, VOCABULARY)
    with torch.no_grad():
        model.network.head.weight.mul_(3.0)
    return model, metadata


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with one export of each form and the images."""
    folder, tagger = tmp_path_factory.mktemp("tools"), make_tagger()
    for form in ("wd14", "imgutils", "cl_tagger", "timm"):
        export(form, *tagger, folder / form, thresholds=THRESHOLDS)
    for number, (width, height, mode) in enumerate(IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (7, 9, len(mode)), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


IMAGES = [(SIDE, SIDE, "RGB"), (SIDE, SIDE, "RGB"), (613, 401, "RGB"), (300, 129, "RGBA")]
SQUARE = range(2)


def prepare(image):
    """Return an image as wd14's and our convention has it: on white, in the middle of a white square, bicubic."""
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    square = Image.new("RGB", (max(image.size),) * 2, "white")
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def wanted(place):
    """Return what the network itself gives of each image: probabilities by (category, name)."""
    model = make_tagger()[0]
    images = [np.array(prepare(Image.open(place / f"{number}.png"))) for number in range(len(IMAGES))]
    with torch.no_grad():
        probs = model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))[1].numpy()
    return [dict(zip(KEYS, row.tolist())) for row in probs]


def passed(probs, threshold_of):
    """Return the (category, name) whose probability reaches a threshold, in the order of WD files."""
    keys = [KEYS[row] for category in (GENERAL, CHARACTER) for row in ORDER if KEYS[row][0] == category]
    return [key for key in keys if probs[key] >= threshold_of(key)]


def assert_like(found, wanted):
    """Assert equal tags on the square images, and an overlap of 95 % on the others."""
    for number in SQUARE:
        assert found[number] == wanted[number] and len(found[number]) > 20
    rest = [(set(found[number]), set(wanted[number])) for number in range(len(SQUARE), len(IMAGES))]
    assert sum(len(a & b) for a, b in rest) >= 0.95 * sum(len(a | b) for a, b in rest)


# --- kohya-ss/sd-scripts 48d368f, finetune/tag_images_by_wd14_tagger.py (up to fc40a27 it drops alpha)


def sd_scripts_image(image):
    """Return [448, 448, 3] BGR. OpenCV's INTER_AREA, which shrinks, is Pillow's BOX."""
    if image.mode in ("RGBA", "LA"):
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[-1])
        image = white
    pixels = np.array(image.convert("RGB"))[:, :, ::-1]
    side = max(pixels.shape[:2])
    pads = [((side - length) // 2, side - length - (side - length) // 2) for length in pixels.shape[:2]]
    square = Image.fromarray(np.ascontiguousarray(np.pad(pixels, (*pads, (0, 0)), constant_values=255)))
    resample = Image.Resampling.BOX if side >= 448 else Image.Resampling.LANCZOS
    return np.asarray(square.resize((448, 448), resample)).astype(np.float32)


def sd_scripts(folder, images, threshold=0.35):
    """Return captions, with `--onnx --remove_underscore --use_rating_tags` and a batch of all images."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batch = np.stack([sd_scripts_image(image) for image in images])
    probs = session.run(None, {session.get_inputs()[0].name: batch})[0]
    with open(folder / "selected_tags.csv", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header[:3] == ["tag_id", "name", "category"]
    ratings, general, character = (
        [name.replace("_", " ") if len(name) > 3 else name for _, name, found, *_ in rows if found == category]
        for category in "904"
    )
    captions = []
    for prob in probs:
        tags = [name for name, p in zip([*general, *character], prob[4:], strict=True) if p >= threshold]
        captions.append(", ".join([ratings[prob[:4].argmax()], *tags]))
    return captions


def test_sd_scripts_writes_our_tags(place, wanted):
    found = sd_scripts(place / "wd14", [Image.open(place / f"{number}.png") for number in range(len(IMAGES))])
    ours = [
        [max(("general", "questionable", "explicit"), key=lambda name: probs[RATING, name]),
         *(name.replace("_", " ") if len(name) > 3 else name for _, name in passed(probs, lambda _: 0.35))]
        for probs in wanted
    ]  # fmt: skip
    assert found[0] == ", ".join(ours[0])  # names with commas split below
    assert_like([caption.split(", ") for caption in found], [", ".join(tags).split(", ") for tags in ours])


def test_sd_scripts_reads_a_cl_tagger_with_every_category(place, wanted):
    """`--repo_id a/b/c`: logits of NCHW, BGR, -1 to 1."""
    tags = json.loads((place / "cl_tagger/tag_mapping.json").read_text(encoding="utf-8"))
    assert {tag["category"] for tag in tags.values()} == {"Rating", "General", "Character", "Copyright", "Artist"}
    session = onnxruntime.InferenceSession(place / "cl_tagger/model_optimized.onnx", providers=["CPUExecutionProvider"])
    images = [sd_scripts_image(Image.open(place / f"{number}.png")) for number in range(len(IMAGES))]
    batch = np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1.0
    logits = session.run(None, {session.get_inputs()[0].name: batch})[0]
    found = [{tags[str(row)]["tag"] for row in np.flatnonzero(one >= 0.0)} for one in logits]
    assert_like(found, [{name for (_, name), prob in probs.items() if prob >= 0.5} for probs in wanted])


# --- dghs-imgutils 0.19.0, unchanged and offline

PROGRAM = """
import json, sys
import numpy as np
from imgutils.generic import multilabel_timm_predict
from imgutils.tagging import convert_wd14_emb_to_prediction, get_wd14_tags
found = []
for path in sys.argv[1:]:
    forms = ("rating", "general", "character")
    wd14, embedding = get_wd14_tags(path, model_name="ViT_v3", fmt=(forms, "embedding"))
    again = convert_wd14_emb_to_prediction(np.asarray(embedding), model_name="ViT_v3")
    every = multilabel_timm_predict(path, repo_id="me/every", fmt="tag")
    found.append({"wd14": wd14, "again": again, "every": every})
print(json.dumps(found))
"""


def make_hub(place, folder):
    """Lay the exports out as the cache of the hub, as if they had been downloaded."""
    published = {"deepghs/wd14_tagger_with_embeddings": "SmilingWolf/wd-vit-tagger-v3",
                 "SmilingWolf/wd-vit-tagger-v3": ".", "me/every": "."}  # fmt: skip
    for repository, inside in published.items():
        home = folder / f"hub/models--{repository.replace('/', '--')}"
        snapshot = home / "snapshots" / ("0" * 40) / inside
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        (home / "refs").mkdir()
        (home / "refs/main").write_text("0" * 40)
        snapshot.resolve().symlink_to(place / ("imgutils" if repository == "me/every" else "wd14"))


@pytest.fixture(scope="module")
def imgutils(place, tmp_path_factory):
    """Return what imgutils finds in each image."""
    if not INTEROP.exists():
        pytest.skip("imgutils is not installed: make install-interop")
    folder = tmp_path_factory.mktemp("hub")
    make_hub(place, folder)
    environment = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [INTEROP, "-c", PROGRAM, *(place / f"{number}.png" for number in range(len(IMAGES)))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_imgutils_finds_our_tags_in_a_wd14_file(imgutils, wanted):
    found = [set(general) | set(character) for _, general, character in (one["wd14"] for one in imgutils)]
    ours = [{name for _, name in passed(probs, lambda key: 0.85 if key[0] == CHARACTER else 0.35)} for probs in wanted]
    assert_like(found, ours)
    rating, general, _ = imgutils[0]["wd14"]
    assert list(rating) == ["general", "sensitive", "questionable", "explicit"] and rating["sensitive"] == 0.0
    assert rating["explicit"] == pytest.approx(wanted[0][RATING, "explicit"], abs=1e-4)
    assert general == pytest.approx({name: wanted[0][GENERAL, name] for name in general}, abs=1e-4)
    for again, direct in zip(imgutils[0]["again"], imgutils[0]["wd14"], strict=True):  # from its embedding
        assert again == pytest.approx(direct, abs=1e-4)


def test_imgutils_takes_each_tags_own_threshold_from_the_general_format(imgutils, wanted):
    least = dict(zip(VOCABULARY.columns, THRESHOLDS.of_tags(VOCABULARY, PER_TAG)))
    ours = [{name for category, name in KEYS if probs[category, name] >= least[category, name]} for probs in wanted]
    assert_like([set(one["every"]) for one in imgutils], ours)


# --- timm, as neggles/wdv3-timm 2f49e85 uses it


def test_timm_gives_our_tags_for_bgr(place, wanted):
    model = timm.create_model(f"local-dir:{place / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg, model=model))
    images = [prepare(Image.open(place / f"{number}.png")) for number in range(len(IMAGES))]
    batch = torch.stack([transform(image) for image in images])[:, [2, 1, 0]]
    with torch.no_grad():
        probs = model(batch).sigmoid().numpy()
    with open(place / "timm/selected_tags.csv", encoding="utf-8") as stream:
        keys = [(int(row["category"]), row["name"]) for row in csv.DictReader(stream)]
    for found, ours in zip(probs, wanted):
        assert dict(zip(keys, found.tolist())) == pytest.approx(ours, abs=1e-4)
