"""Refusals of what users get wrong, and dry runs. Each refusal begins with the key, names the file, says what to do,
leaves nothing behind.

The scripts' bodies run in the test's own process. What the command line refuses: tests/utils/config/test_messages.py.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.in_process import SHORT, TINY, make_images, run, run_command
from tests.support import refuses
from utils.config.messages import ConfigError
from utils.io.files import read_json, write_json


@pytest.fixture(scope="module")
def place(folder):
    """A folder with images, a pretraining and a fine-tuning run on them, and files that are none of ours."""
    make_images(folder / "images")
    run("pretrain_fcmae", [*TINY, "task.decoder_dim=8", "data.root=images", "run_dir=pretrained"], folder)
    run("finetune", [*TINY, "data.root=images", "run_dir=tuned"], folder)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, folder / "foreign.pth")
    save_file({"conv1.weight": torch.zeros(3)}, folder / "foreign.safetensors")
    (folder / "broken.safetensors").write_bytes(b"x")
    shutil.copytree(folder / "tuned/checkpoints/step_00000002", folder / "damaged")
    (folder / "damaged/weights.safetensors").write_bytes(b"x")
    return folder


def state_of(place):
    """Return when each file was written, but for caches and logs."""
    files = [path for path in place.rglob("*.*") if path.is_file() and "outputs" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in files if path.name not in ("log.txt", ".lock")}


# A message begins with the key, and names what follows ` ... `.
WRONG = {
    "finetune augment.mean=[0.5] augment.std=[0.5]": "augment.mean: ",
    "finetune augment.std=[0.5]": "augment.std: 1 numbers",
    "finetune model=timm model.name=test_resnet optim.layer_decay=0.9": "optim.layer_decay_kind: single ... =timm",
    "finetune init_from=broken.safetensors": "init_from: broken.safetensors",
    "finetune init_from=foreign.pth": "init_from: ... stages.0.0.grn.gamma",
    "pretrain_fcmae task.patch_px=3": "task.patch_px: ",
    "pretrain_fcmae task.patch_px=16 augment.image_size_hw=[32,40]": "augment.image_size_hw: ",
    "finetune init_from=nowhere dry_run=true": "init_from: nowhere does not exist",
    "finetune init_from=pretrained model.dims=[8,24]": "init_from: ... (16, 8, 2, 2) ... (24, 8, 2, 2) ... model.dims",
    "finetune run_dir=tuned resume=damaged": "resume: damaged ... weights.safetensors",
    "finetune run_dir=tuned seed=1 optim.lr=0.5 loop.total_steps=3": "resume: ... 'resume_allow=[optim.lr,seed]'.",
    "finetune run_dir=tuned loop.total_steps=1": "loop.total_steps: ",
    "finetune run_dir=tuned optim.base_lr=0.7 dry_run=true": "resume: ... optim.base_lr: ",
    "finetune loop.checkpoint_mirror=nonsense://x": "loop.checkpoint_mirror: nonsense://x",
    "finetune run_dir=pretrained": "resume: ... task.name: ",
    "export run_dir=tuned weights=foreign.safetensors": "weights: foreign.safetensors",
    "predict weights=pretrained input=images output=found.csv": "output: pretrained",
    "predict weights=tuned input=images output=x.txt": "output: x.txt",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_command_that_cannot_be(command, place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    script, *words = command.split()
    if script in ("finetune", "pretrain_fcmae"):
        own = SHORT if "model=timm" in words else TINY
        words = [*own, "data=image_folder", "data.root=images", "run_dir=refused", *words]
    before = state_of(place)
    with refuses("(?s)^" + ".*".join(map(re.escape, WRONG[command].split(" ... ")))) as refused:
        run(script, words, place)
    assert not isinstance(refused.value, ConfigError), refused.value
    assert state_of(place) == before, "something was left behind"


# ------------------------------------------------------------------------------------------------------------ dry runs

DRY_RUNS = {
    "evaluate": (["run_dir=tuned", "runtime.device=cpu"], "dry run: nothing is evaluated"),
    "export": (["run_dir=tuned"], "dry run: nothing is written"),
    "predict": (["weights=tuned", "input=images", "output=found.csv"], "dry run: 12 images, nothing is predicted"),
    "prepare": (["job=manifest", "data=image_folder", "data.root=images"], "dry run: nothing is written"),
}


@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_dry_run_opens_what_it_was_given_and_writes_nothing(script, place):
    words, said = DRY_RUNS[script]
    before = state_of(place)
    assert run(script, [*words, "dry_run=true"], place) == said
    assert state_of(place) == before


def test_the_model_follows_the_run_in_init_from(place, monkeypatch, capsys):
    words = [*SHORT, "data=image_folder", "augment=glyphs", "data.root=images", "init_from=pretrained"]
    assert run_command("finetune", [*words, "run_dir=follows", "model.drop_path_rate=0.1"], place, monkeypatch) == 0
    saved, source = (read_json(place / name / "config.json")["model"] for name in ("follows", "pretrained"))
    assert saved == source | {"drop_path_rate": 0.1}
    assert run_command("finetune", [*words, "model=convnextv2_atto", "dry_run=true"], place, monkeypatch) == 2
    assert "init_from: " in capsys.readouterr().err


def test_a_text_of_a_strangers_run_is_never_interpolated(place, monkeypatch, capfd):
    """Neither the run folder nor the output has the value of a variable that its config.json names."""
    monkeypatch.setenv("ATELIER_VALUE", "hunter2")
    shutil.copytree(place / "pretrained", place / "stranger")
    config = read_json(place / "stranger/config.json")
    words = [*SHORT, "data=image_folder", "augment=glyphs", "data.root=images", "init_from=stranger", "run_dir=warned"]
    for changes, status in (
        ({"drop_path_rate": "${oc.env:ATELIER_VALUE}"}, 2),
        ({"name": "${oc.env:ATELIER_VALUE}"}, 0),
    ):
        write_json(place / "stranger/config.json", {**config, "model": config["model"] | changes})
        assert run_command("finetune", words, place, monkeypatch) == status
    assert read_json(place / "warned/config.json")["model"]["name"] == "${oc.env:ATELIER_VALUE}"
    assert "hunter2" not in "".join(capfd.readouterr())
    assert not [file for file in (place / "warned").rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]
