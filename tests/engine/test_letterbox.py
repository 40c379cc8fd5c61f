"""augment.pad=buckets: batches of one shape, runs that resume exactly, evaluation, refusals."""

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.open import Data, load_collection
from engine.exports.weights import load_predictor
from engine.tasks.kinds import KINDS
from engine.update.runtime import Runtime
from tests.in_process import SHORT, SMALL_MODEL, configure, run, run_until_killed, working_in
from tests.support import checkpoint_tensors, rows
from utils.config.messages import ConfigError
from utils.errors import UserError
from utils.io.weights import read_weights

SHAPES = [(60, 30), (30, 61), (40, 40), (45, 60)]
OWN = [
    *SMALL_MODEL, *SHORT, "data=image_folder", "data.root=images", "augment=glyphs", "augment.image_size_hw=[64,64]",
    "augment.pad=buckets", "augment.crop_scale=[1,1]", "task.patch_px=16",
    "data.background=white", "model.in_channels=3", "augment.mean=[0.5,0.5,0.5]", "augment.std=[0.5,0.5,0.5]",
    "task.probe.every_epochs=1", "loop.total_steps=6", "loop.checkpoint_every_steps=2", "tracking.samples=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Black images of four shapes in two classes, with tags; one is no image."""
    place = tmp_path_factory.mktemp("letterbox")
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            folder = place / "images" / split / "AB"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((*SHAPES[number % 4], 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"tag {number % 3}, shape {number % 4}")
    (place / "images/train/A/broken.png").write_bytes(b"no image")
    return place


def open_run(script, words):
    config, _ = configure(script, words)
    kind, runtime = KINDS[config.task.name], Runtime(torch.device("cpu"), False, 0, 1, "fp32")
    collection = load_collection(config.data)
    setup = kind.set_up(config, collection)
    source = kind.source(collection, config.data, setup, repeats=True)
    data = Data(collection, source, runtime, seed=config.seed, batch_size=2, run_path=None)
    return data, kind.streams(data, setup, config)


def test_batches_have_one_shape_and_padding_is_white(place):
    patch_px, sizes = 8, {(24, 40), (32, 32), (40, 24)}
    with working_in(place):
        _, streams = open_run(
            "pretrain_fcmae", [*OWN, "augment.image_size_hw=[32,32]", "task.patch_px=8", "augment.shrink=true"]
        )
        steps = streams.train.steps(0, 4, 2)
        batches = {"train": [batch for step in islice(steps, 39) for batch in step], **streams.evaluation}
        batches = {name: list(found) for name, found in batches.items()}
    assert streams.train.chunk == 4 and len(streams.train.sampler.examples()) == 3
    for name, of_name in batches.items():
        assert {tuple(batch["images"].shape[-2:]) for batch in of_name} == sizes, name
    counts = torch.bincount(torch.cat([batch["sample_id"] for batch in batches["train"]]))
    assert (counts[counts > 0] == 12).all() and (counts > 0).sum() == 13  # 12 epochs of 13 images, one unreadable
    seen = torch.cat([batch["sample_id"][batch["weight"] > 0] for batch in batches["val"]])
    assert len(seen) == len(set(seen.tolist())) == 6
    for batch in batches["train"] + batches["val"]:
        assert batch["mask"].shape[1] == batch["images"][0, 0].numel() // patch_px**2
        height, width = batch["images"].shape[-2:]
        assert (batch["images"][0] == 255).any() or height == width


def test_a_run_resumes_exactly_and_its_weights_are_evaluated_in_buckets(place):
    run("pretrain_fcmae", [*OWN, "run_dir=whole"], place)
    run_until_killed("pretrain_fcmae", [*OWN, "run_dir=killed"], place, 3)
    run("pretrain_fcmae", [*OWN, "run_dir=killed"], place)
    whole, killed = (checkpoint_tensors(place / name, 6) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert rows(place / "whole/metrics.jsonl") == rows(place / "killed/metrics.jsonl")
    run("evaluate", ["run_dir=whole", "weights=last", "output=found.json", "runtime.device=cpu"], place)
    last = rows(place / "whole/metrics.jsonl", "evaluate")[-1]["loss"]
    assert json.loads((place / "found.json").read_text())["loss"] == pytest.approx(last, rel=1e-4)


LABELLED = [
    *SMALL_MODEL, *SHORT, "data=image_folder", "data.root=images", "augment=light", "augment.image_size_hw=[64,64]",
    "augment.pad=buckets", "augment.horizontal_flip=0",
]  # fmt: skip
TASKS = {
    "classification": ["task.head=fitted", "task.mixup_alpha=0.8"],
    "tagging": ["task=tagging", "task.min_count=1", "task.orientation=booru"],
}


@pytest.mark.parametrize("task", TASKS)
def test_a_labelled_task_is_trained_evaluated_and_predicted_in_buckets(place, task):
    words = [*LABELLED, *TASKS[task]]
    run("finetune", [*words, f"run_dir={task}"], place)
    assert "augment.pad=buckets: 3 of 48 x 84, 3 of 56 x 72, " in (place / task / "log.txt").read_text()
    run("evaluate", [f"run_dir={task}", "weights=last", "output=found.json", "runtime.device=cpu"], place)
    last = rows(place / task / "metrics.jsonl", "evaluate")[-1]["loss"]
    assert json.loads((place / "found.json").read_text())["loss"] == pytest.approx(last, rel=1e-4)

    weights, threshold = place / task / "weights/last_weights.safetensors", ["threshold=0"] * (task == "tagging")
    run("predict", [f"weights={weights}", "input=images/val", "output=found.jsonl", "device=cpu", *threshold], place)
    found = {Path(row["path"]).stem: row for row in map(json.loads, (place / "found.jsonl").read_text().splitlines())}
    (place / "found.jsonl").unlink()
    predictor, seen = load_predictor(weights, torch.device("cpu")), set()
    with working_in(place):
        data, streams = open_run("finetune", words)
        for batch in streams.evaluation["val"]:
            seen.add(tuple(batch["images"].shape[-2:]))
            expected_rows = predictor.rows(batch["images"], predictor.options(5, np.float32(0)))
            for row, expected in zip(batch["sample_id"], expected_rows):
                mine = found[Path(data.collection.row(int(row)).path).stem]
                assert numbers_of(mine) == pytest.approx(numbers_of(expected), abs=2e-6)
    assert seen == {(48, 84), (56, 72), (64, 64), (84, 48)} and len(found) == 6


def numbers_of(row):
    """Return the probabilities of a predicted row, in order."""
    return [float(text) for text in re.findall(r"\d\.\d+", json.dumps([row.get("top"), row.get("probs")]))]


def test_exports_and_students_refuse_predictions_in_buckets_and_exported_features_state_a_square(place):
    run("finetune", [*LABELLED, "run_dir=exported"], place)
    with pytest.raises(UserError, match=r"^task\.teacher: exported was trained on images of several shapes"):
        run("finetune", [*LABELLED, "task=distillation", "task.teacher=exported", "augment.pad=square"], place)
    with pytest.raises(UserError, match=r"^weights: they were trained on images of several shapes \(augment.pad"):
        run("export", ["run_dir=exported"], place)
    run("export", ["run_dir=exported", "backbone_only=true", "format=safetensors", "output=features"], place)
    served = read_weights(place / "features/model.safetensors")[1]["preprocessing"]
    assert served["pad"] == "square" and "buckets_hw" not in served


def test_networks_and_teachers_of_one_size_refuse_buckets(place):
    vit = ["model=timm", "model.name=vit_tiny_patch16_224", "augment.image_size_hw=[224,224]"]
    with pytest.raises(UserError, match=r"^augment\.image_size_hw: .* is no size for vit_tiny"):
        run("finetune", [*LABELLED[len(SMALL_MODEL) :], *vit], place)
    for change in (
        ["task=distillation", "task.teacher=resnet18"],
        ["augment.on_device=true"],
        ["loop.sampling=blocks"],
    ):
        with pytest.raises(ConfigError, match=r"augment\.pad: buckets "):
            configure("finetune", [*LABELLED, *change])
