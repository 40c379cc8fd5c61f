"""Taggers of others, in the layouts that their programs publish: in, out, evaluated, compared, continued.

The networks are timm's test networks with varied weights. What they should give is computed here, as imgutils does:
deepghs/imgutils:imgutils/tagging/wd14.py (a white square, bicubic, BGR, 0 to 255).
"""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models.interop.parity import vary_weights
from tests.in_process import SHORT, run
from tests.support import make_collection, read_table
from utils.formats.vocabulary import Vocabulary, write_vocabulary

SIDE = 64
KEYS = [(9, "general"), (9, "sensitive"), (9, "questionable"), (9, "explicit"), (0, "square"), (0, "disc"), (0, "hat"),
        (4, "bob"), (4, "ann_(x)")]  # fmt: skip
VOCABULARY = Vocabulary(
    tuple(name for _, name in KEYS), tuple(category for category, _ in KEYS), (90, 80, 70, 60, 50, 40, 30, 20, 10),
    (9999999, 9999998, 9999997, 9999996, 1, 2, 3, 4, 5),
)  # fmt: skip
NETWORKS = {
    "test_vit": {
        "act_layer": "gelu_tanh",
        "img_size": SIDE,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "test_convnext2": {},
}
DATA = ["data=image_folder", "data.root=images"]
ON_CPU = ["runtime.device=cpu", "runtime.threads=1", "runtime.workers=0", "runtime.precision=fp32"]


def build(name):
    torch.manual_seed(0)
    return vary_weights(timm.create_model(name, num_classes=len(KEYS), **NETWORKS[name])).eval()


def write_timm(folder, name="test_vit"):
    """Write the files of a tagger of timm, as SmilingWolf/wd-vit-tagger-v3 has them."""
    folder.mkdir(parents=True)
    network = build(name)
    stated = {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": name, "num_classes": len(KEYS), "model_args": NETWORKS[name]}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {**stated, "crop_pct": 1.0}}))
    save_file(network.state_dict(), folder / "model.safetensors")
    write_vocabulary(folder / "selected_tags.csv", VOCABULARY)
    return network


def prepare(path):
    """Return BGR levels [H, W, 3] as imgutils prepares an image."""
    image = Image.open(path).convert("RGB")
    square = Image.new("RGB", (max(image.size),) * 2, "white")
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)[:, :, ::-1].copy()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with tagged images, and taggers."""
    folder = tmp_path_factory.mktemp("foreign")
    make_collection(folder / "images", per_class=4, classes="AB", validation=4)
    for file in (folder / "images").rglob("*.txt"):
        file.write_text({"A": "square", "B": "disc, round"}[file.parent.name])
    for name in NETWORKS:
        write_timm(folder / name, name)
    return folder


def predicted(place, weights, **changes):
    """Return the probabilities of the validation images by tag."""
    words = [f"weights={weights}", "input=images/val", "output=found.jsonl", "threshold=0.0", "device=cpu", "workers=0"]
    run("predict", words, place)
    rows = [json.loads(line) for line in (place / "found.jsonl").read_text().splitlines()]
    return {row["path"]: {name: prob for part in row["probs"].values() for name, prob in part.items()} for row in rows}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_tagger_comes_in_and_goes_out_as_it_was(name, place):
    words = [
        "task=tagging",
        f"task.vocabulary={name}",
        "task.rating_s=general",
        f"init_from={name}",
        "loop.total_steps=0",
    ]
    run("finetune", [*SHORT[1:], *DATA, *words, f"run_dir=run_{name}"], place)
    run("export", ["format=timm", f"run_dir=run_{name}", f"output=out_{name}"], place)
    given, found = (load_file(place / folder / "model.safetensors") for folder in (name, f"out_{name}"))
    assert given.keys() == found.keys() and all(torch.equal(given[key], found[key]) for key in given)
    given, found = (json.loads((place / folder / "config.json").read_text()) for folder in (name, f"out_{name}"))
    assert all(found[key] == given[key] for key in ("architecture", "num_classes", "model_args"))
    assert read_table(place / name / "selected_tags.csv") == read_table(place / f"out_{name}" / "selected_tags.csv")
