"""The exports of a tagger in the programs that read them: the same tags as the network itself gives in PyTorch.

timm runs as it is, imgutils in slow_wd14_tools.py. sd-scripts and ComfyUI-WD14-Tagger, which are no packages, read the
file as the program in its README.md does, for images of SIDE in place of 448 px.
"""

import json
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

from models.interop.tag_forms import to_wd_order
from tests.models.test_export_formats import geometry
from tests.models.test_export_snippets import run_program
from tests.models.test_tag_exports import open_tagger
from tests.support import export, read_table, thresholds_of
from utils.formats.spelling import CHARACTER, GENERAL, RATING
from utils.formats.thresholds import PER_TAG
from utils.formats.vocabulary import Vocabulary, read_vocabulary, vocabulary_of
from utils.io.files import write_json

SIDE = 128
FILES = {
    "model.onnx",
    "inv.npz",
    "model.safetensors",
    "config.json",
    "selected_tags.csv",
    "thresholds.csv",
    "README.md",
}
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
LEAST = dict(zip(VOCABULARY.columns, THRESHOLDS.of_tags(VOCABULARY, PER_TAG)))


def make_tagger():
    """Return a small tagger whose probabilities spread, as export.py opens it: of the four stages that timm has."""
    model, metadata = open_tagger(geometry().model_copy(update={"depths": [1, 1, 1, 1]}), SIDE, VOCABULARY)
    with torch.no_grad():
        model.network.head.weight.mul_(3.0)
    return model, metadata


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with the repository for all programs, and the images."""
    measured = {
        "weights": "/home/me/w",
        "weights_hash": "hash",
        "split": "val",
        "measured": "validation: 9 images",
        "mAP": 0.71,
        "seconds": 3.0,
    }
    write_json(folder / "metrics.json", measured)
    report = export("wd_repository", *make_tagger(), folder / "repo", thresholds=THRESHOLDS, run_dir=str(folder))
    assert report["left_out"] == {"artist": 1, "copyright": 1} and report["constant"] == ["sensitive"]
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


def look(place):
    """Return what the network itself gives of each image: probabilities by (category, name)."""
    images = [np.array(prepare(Image.open(place / f"{number}.png"))) for number in range(len(IMAGES))]
    with torch.no_grad():
        probs = make_tagger()[0](torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))[1].numpy()
    return [dict(zip(KEYS, row.tolist())) for row in probs]


@pytest.fixture(scope="module")
def wanted(place):
    return look(place)


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


# --- the file itself


def test_a_wd14_file_takes_and_gives_what_the_programs_expect(place):
    proto, ordered = onnx.load(place / "repo/model.onnx"), to_wd_order(VOCABULARY)[0]
    (taken,), gives = proto.graph.input, proto.graph.output
    sizes = taken.type.tensor_type.shape.dim
    assert taken.name == "input" and sizes[0].dim_param and [size.dim_value for size in sizes[1:]] == [SIDE, SIDE, 3]
    assert [value.name for value in gives] == ["output", "embedding"]
    assert [value.type.tensor_type.shape.dim[1].dim_value for value in gives] == [len(ordered), 20]
    assert {path.name for path in (place / "repo").iterdir()} == FILES
    found = json.loads({entry.key: entry.value for entry in proto.metadata_props}["atelier"])
    assert vocabulary_of(found) == read_vocabulary(place / "repo/selected_tags.csv") == ordered
    assert found["weights_hash"] == "hash"
    least = [float(row["best_threshold"]) for row in read_table(place / "repo/selected_tags.csv")]
    assert least == found["thresholds"] == [LEAST.get(key, 0.35) for key in ordered.columns]


def test_the_readme_has_front_matter_figures_and_a_program_that_prints_rating_and_tags(place, wanted, tmp_path):
    shutil.copytree(place / "repo", tmp_path, dirs_exist_ok=True)
    shutil.copy(place / "0.png", tmp_path / "image.png")
    readme = (tmp_path / "README.md").read_text("utf-8")
    assert readme.startswith("---\nlibrary_name: timm\npipeline_tag")
    assert "- mAP: 0.71\n" in readme and "high_recall" in readme
    assert "/home/me" not in readme and "seconds" not in readme and "Measured on `validation: 9 images`:" in readme
    found, _ = run_program(tmp_path)
    assert found["tags"] == pytest.approx({key[1]: wanted[0][key] for key in passed(wanted[0], LEAST.get)}, abs=1e-3)
    assert found["rating"] == max(("general", "questionable", "explicit"), key=lambda name: wanted[0][RATING, name])


# --- timm, as neggles/wdv3-timm 2f49e85 uses it


def test_timm_gives_our_tags_for_bgr_in_the_same_rows(place, wanted):
    model = timm.create_model(f"local-dir:{place / 'repo'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg, model=model))
    images = [prepare(Image.open(place / f"{number}.png")) for number in range(len(IMAGES))]
    batch = torch.stack([transform(image) for image in images])[:, [2, 1, 0]]
    with torch.no_grad():
        probs = model(batch).sigmoid().numpy()
    keys = [(int(row["category"]), row["name"]) for row in read_table(place / "repo/selected_tags.csv")]
    for found, ours in zip(probs, wanted):
        given = dict(zip(keys, found.tolist()))
        assert given == pytest.approx({key: ours.get(key, 0.0) for key in given}, abs=1e-4)
