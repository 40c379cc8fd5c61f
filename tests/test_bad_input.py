"""Refusals of what users get wrong. Each begins with the key, names the file, says what to do, leaves nothing behind.

The scripts' bodies run in the test's own process. What the command line refuses: tests/utils/config/test_messages.py.
"""

import csv
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.in_process import SHORT, TINY, make_images, run
from tests.support import make_collection
from utils.config.messages import ConfigError
from utils.errors import UserError
from utils.io.files import read_json


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a pretraining and a fine-tuning run on them, and files that are none of ours."""
    folder = tmp_path_factory.mktemp("bad_input")
    make_images(folder / "images")
    run("pretrain_fcmae", [*TINY, "task.decoder_dim=8", "data.root=images", "run_dir=pretrained"], folder)
    run("finetune", [*TINY, "data.root=images", "run_dir=tuned"], folder)
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts/readme.txt").write_text("no image")
    (folder / "file").write_text("a file")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, folder / "foreign.pth")
    save_file({"conv1.weight": torch.zeros(3)}, folder / "foreign.safetensors")
    (folder / "broken.safetensors").write_bytes(b"x")
    (folder / "broken.onnx").write_bytes(b"x")
    shutil.copytree(folder / "tuned/checkpoints/step_00000002", folder / "damaged")
    (folder / "damaged/weights.safetensors").write_bytes(b"x")
    return folder


def refusal(script, overrides, folder):
    before = sorted(path for path in folder.iterdir() if path.name != "outputs")
    with pytest.raises(UserError) as refused:
        run(script, overrides, folder)
    assert not isinstance(refused.value, ConfigError), refused.value
    assert sorted(path for path in folder.iterdir() if path.name != "outputs") == before, "something was left behind"
    return str(refused.value)


def matches(message, pattern):
    """A message begins with a pattern, in which ` ... ` stands for anything."""
    assert re.match(".*".join(map(re.escape, pattern.split(" ... "))), message, re.DOTALL), message


# --------------------------------------------------------------------------------------------------- images and classes


@pytest.mark.parametrize("script", ["pretrain_fcmae", "finetune", "prepare"])
@pytest.mark.parametrize("root", ["nowhere", "file", "texts"])
def test_a_folder_without_a_collection(script, root, place):
    overrides = ["job=manifest", "data=image_folder"] if script == "prepare" else TINY
    matches(refusal(script, [*overrides, f"data.root={root}"], place), f"data.root: '{root}' ")


CLASSES = {
    "val/B": "data.root: 1 class ('B') of 'images' without a validation image ... set task.allow_missing_classes=true",
    "train/C": "data.root: 1 class ('C') of 'images' in the validation split only",
    "val": "data.root: 3 classes ('A', 'B', 'C') ... without a validation image ... set data.validation_fraction",
}


@pytest.mark.parametrize("gone", CLASSES)
def test_classes_that_do_not_fit(gone, tmp_path):
    make_images(tmp_path / "images", "ABC")
    for name in gone.split():
        shutil.rmtree(tmp_path / "images" / name)
    overrides = [*TINY, "data.root=images", "data.validation_fraction=0"]
    matches(refusal("finetune", overrides, tmp_path), CLASSES[gone])
    if gone == "val/B":
        run("finetune", [*overrides, "task.allow_missing_classes=true", "dry_run=true"], tmp_path)


def test_class_folders_in_other_scripts(tmp_path):
    """The names reach the tables and the weights as they are."""
    names = ["\u043a\u043e\u0448\u043a\u0430", "\u72d7", "\u0642\u0650\u0637\u0651\u0629", "e\u0301te\u0301"]
    make_images(tmp_path / "images", "ABCD")
    for old, new in zip("ABCD", names):
        for split in ("train", "val"):
            (tmp_path / "images" / split / old).rename(tmp_path / "images" / split / new)
    run("finetune", [*TINY, "data.root=images", "run_dir=run"], tmp_path)
    with open(tmp_path / "run/tables/classes.csv", encoding="utf-8") as stream:
        assert [row["class"] for row in csv.DictReader(stream)] == sorted(names)
    run("predict", ["weights=run", "input=images/val", "output=found.csv"], tmp_path)
    with open(tmp_path / "found.csv", encoding="utf-8") as stream:
        assert {row["class"] for row in csv.DictReader(stream)} <= set(names)


# ---------------------------------------------------------------------------------------------------- unreadable images


def broken_chunk(content):
    """Return a PNG whose header does not match its checksum."""
    return content[:18] + bytes([content[18] ^ 1]) + content[19:]


def test_unreadable_images_are_listed_and_training_goes_on(tmp_path):
    """First, middle and last of both splits, and every image of a class; a whole batch is in the test below."""
    root = make_collection(tmp_path / "images", per_class=3, classes="ABC", validation=2)
    whole = (root / "train/A/000.png").read_bytes()
    broken = {
        "train/A/000.png": b"", "train/B/002.png": b"a text", "train/C/000.png": whole[: len(whole) // 2],
        "train/C/001.png": broken_chunk(whole), "train/C/002.png": b"<html>", "val/A/000.png": whole[:10],
        "val/C/001.png": b"",
    }  # fmt: skip
    for path, content in broken.items():
        (root / path).write_bytes(content)
    run("finetune", [*TINY, "data.root=images", "run_dir=run"], tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "run/unreadable.jsonl").read_text().splitlines()]
    assert sorted(row["path"] for row in listed) == sorted(broken) and all(row["reason"] for row in listed)
    said = (tmp_path / "run/log.txt").read_text()
    assert all(said.count(f"unreadable image {path}: ") == 1 for path in broken)
    assert f"WARNING unreadable images: {len(broken)}, each with weight 0, in this start" in said
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in metrics for name, value in row.items() if name.endswith("loss"))


def test_a_batch_of_which_nothing_can_be_read_is_skipped(tmp_path):
    make_images(tmp_path / "images")
    paths = sorted((tmp_path / "images/train").rglob("*.png"))
    for path in paths[:-1]:
        path.write_bytes(b"")
    run("finetune", [*TINY, "data.root=images", "run_dir=run"], tmp_path)
    said = (tmp_path / "run/log.txt").read_text()
    assert said.count(" was skipped: none of its images could be read") == 1
    assert (tmp_path / "run/weights/last_weights.safetensors").exists()


SPLITS = {
    "gone val": "data.root: the validation split is empty ... set data.validation_fraction",
    "gone train": "data.root: there is no sample to train on",
    "unreadable val": "data.root: no image of the validation split could be read",
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_split_without_images(case, tmp_path):
    make_images(tmp_path / "images")
    what, split = case.split()
    for path in (tmp_path / "images" / split).rglob("*.png"):
        path.unlink() if what == "gone" else path.write_bytes(b"no image")
    overrides = [*TINY, "task.decoder_dim=8", "data.root=images", "data.validation_fraction=0", "run_dir=run"]
    with pytest.raises(UserError) as refused:
        run("pretrain_fcmae", overrides, tmp_path)
    matches(str(refused.value), SPLITS[case])


def test_batch_norm_over_one_value_is_named(tmp_path):
    make_images(tmp_path / "images")
    own = ["model=timm", "model.name=resnet18", "data=image_folder", "augment.image_size_hw=[32,32]"]
    sizes = ["loop.global_batch_size=1", "loop.batch_size=1"]
    with pytest.raises(UserError, match=r"^loop.batch_size: batch norm cannot"):
        run("finetune", [*SHORT, *own, *sizes, "data.root=images", "run_dir=run"], tmp_path)


# --------------------------------------------------------------------------------------------- sizes, models, machines

WRONG = {
    "augment.image_size_hw=[15,16]": "augment.image_size_hw: [15, 16] is not a multiple ... ; set [16, 16]",
    "augment.mean=[0.5] augment.std=[0.5]": "augment.mean: 1 numbers for a network of 3 input channels",
    "model=timm model.name=test_resnet optim.layer_decay=0.9": "optim.layer_decay_kind: ",
    "optim.rules=[{match:network.head.wieght,lr_scale:0.5}]": "optim.rules.0.match: ... close: network.head.weight",
    "runtime.device=cuda": "runtime.device: cuda was requested and torch sees no GPU; set runtime.device=auto or cpu",
    "init_from=nowhere": "init_from: nowhere does not exist",
    "init_from=broken.safetensors": "init_from: broken.safetensors is not a readable safetensors file (",
    "init_from=foreign.pth": "init_from: ... stages.0.0.grn.gamma  ... Set the model",
    "init_from=pretrained model.dims=[8,24]": "init_from: 12 of ... (16, 8, 2, 2)      (24, 8, 2, 2) ... dims=[8,16]",
    "pretrain_fcmae task.patch_px=3": "task.patch_px: 3 is not a multiple of the encoder's total stride 4",
    "pretrain_fcmae task.mask_ratio=0.999": "task.mask_ratio: 0.999 ... ; set it above 0 and below 0.937",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_training_that_cannot_be(command, place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    script = "pretrain_fcmae" if command.startswith("pretrain_fcmae ") else "finetune"
    own = SHORT if "model=timm" in command else TINY
    changes = command.removeprefix("pretrain_fcmae ").split()
    overrides = [*own, "data=image_folder", "data.root=images", "run_dir=refused", *changes]
    matches(refusal(script, overrides, place), WRONG[command])


def test_a_compiler_that_is_not_there(place, monkeypatch):
    monkeypatch.setattr("engine.runtime.missing_for_compile", lambda device: ["a compiler on the PATH (g++)"])
    message = refusal("finetune", [*TINY, "data.root=images", "runtime.compile=true", "run_dir=refused"], place)
    matches(message, "runtime.compile: true needs a compiler on the PATH (g++)")


# ------------------------------------------------------------------------------------------------------------- resuming

RESUME = {
    "resume=never": "resume: never was given, but tuned holds 2 checkpoints ... set resume=auto",
    "resume=nowhere": "resume: nowhere is not a checkpoint folder; name one like RUN/checkpoints/step_00001200",
    "resume=empty": "resume: empty is ... ; name another one",
    "resume=damaged": "resume: damaged is damaged: weights.safetensors does not match its checksum; name another one",
    "seed=1 optim.lr=0.5 loop.total_steps=3": (
        "resume: ... another recipe:\n  optim.lr: None in the run, 0.5 now\n  seed: 0 in the run, 1 now\n"
        " ... 'resume_allow=[optim.lr,seed]'."
    ),
    "resume_allow=[optim.lrr]": "resume_allow: 'optim.lrr' is not a key of this configuration",
    "model.dims=[8,24] resume_allow=[model.dims]": "resume: ... is of another model: 15 tensors of weights differ",
    "loop.total_steps=1": "loop.total_steps: the run is already at step 2, beyond the 1 requested",
    "run_dir=pretrained": "resume: ... another recipe: ... task.name: 'fcmae' in the run, 'classification' now",
}


@pytest.mark.parametrize("command", RESUME)
def test_a_resumption_that_cannot_be(command, place):
    before = {path: path.read_bytes() for path in (place / "tuned").rglob("*.json*")}
    overrides = [*TINY, "data.root=images", "run_dir=tuned", *command.split()]
    matches(refusal("finetune", overrides, place), RESUME[command])
    assert {path: path.read_bytes() for path in (place / "tuned").rglob("*.json*")} == before, "the run was changed"


@pytest.fixture
def copied_run(place, tmp_path):
    for name in ("images", "tuned"):
        shutil.copytree(place / name, tmp_path / name)
    return tmp_path


def test_an_allowed_difference_goes_through_and_is_logged_and_kept(copied_run):
    overrides = ["optim.lr=0.5", "resume_allow=[optim.lr]", "loop.total_steps=3"]
    run("finetune", [*TINY, "data.root=images", "run_dir=tuned", *overrides], copied_run)
    said = (copied_run / "tuned/log.txt").read_text()
    assert "WARNING resume_allow accepts optim.lr: None in the run, 0.5 now" in said
    assert read_json(copied_run / "tuned/config.json")["optim"]["lr"] == 0.5
    assert read_json(copied_run / "tuned/config.before_resume.json")["optim"]["lr"] is None


def test_a_run_of_which_every_checkpoint_is_damaged_does_not_start_again(copied_run):
    for path in (copied_run / "tuned/checkpoints").rglob("state.json"):
        path.write_text("{}")
    message = refusal("finetune", [*TINY, "data.root=images", "run_dir=tuned", "loop.total_steps=3"], copied_run)
    matches(message, "resume: all 2 checkpoints in tuned/checkpoints are damaged")


# ------------------------------------------------------------------------------------- evaluation, export, prediction

OTHERS = {
    "evaluate run_dir=nowhere": "run_dir: nowhere is not a run folder: it has no config.json",
    "evaluate run_dir=tuned weights=ema": "weights: the run tuned has no ema weights; it has best, last",
    "export run_dir=nowhere": "run_dir: nowhere does not exist",
    "export run_dir=tuned weights=foreign.safetensors": "weights: foreign.safetensors was not written by a run",
    "predict weights=pretrained input=images": "output: pretrained gives vectors, which CSV does not",
    "predict weights=foreign.pth input=images": "weights: foreign.pth was not written by a run",
    "predict weights=broken.onnx input=images": "weights: broken.onnx is not a readable ONNX file (",
    "predict weights=tuned input=images device=cuda": "device: cuda was requested and torch sees no GPU",
    "predict weights=tuned input=images output=x.txt": "output: x.txt ends in '.txt'; name a .jsonl or .csv file",
    "predict weights=tuned input=images output=texts/": "output: texts is for tags, which tuned does not give",
    "predict weights=tuned input=images output=x.jsonl existing=append": "existing: append is for the texts of tags",
    "predict weights=tuned input=file.npz output=x.csv like=images/a.png": "input: file.npz has no embeddings (",
    "predict weights=tuned input=images output=file/found.csv": "output: file",
}


@pytest.mark.parametrize("command", OTHERS)
def test_what_is_given_to_the_scripts_after_training(command, place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    script, *overrides = command.split()
    if script == "predict" and "output" not in command:
        overrides.append("output=found.csv")
    matches(refusal(script, overrides, place), OTHERS[command])


def test_a_collection_that_has_moved_is_named_when_a_run_is_evaluated(copied_run):
    (copied_run / "images").rename(copied_run / "moved")
    matches(refusal("evaluate", ["run_dir=tuned"], copied_run), "data.root: 'images' does not exist (looked from /")
