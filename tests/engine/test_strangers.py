"""The strangers' tasks of tests/tasks under every script: roles, initial weights, what is judged, exported and saved,
frozen networks. Exact resume and ranks: test_exactness.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from engine.exports.weights import open_weights
from tests.engine.test_checkpoint import replace_state
from tests.in_process import SHORT, make_images, run
from tests.support import assert_same_tensors, refuses, rows
from utils.io.files import read_json
from utils.io.weights import read_weights, write_weights

OVERRIDES = [*SHORT, "data.root=images", "augment.image_size_hw=[32,32]", "loop.total_steps=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with images and a run of each task, with an average."""
    folder = tmp_path_factory.mktemp("strangers")
    make_images(folder / "images")
    for task in ("multicrop", "flow"):
        run(f"tests.tasks.{task}", [*OVERRIDES, f"run_dir={task}", "loop.ema_decay=0.9"], folder)
    return folder


ON_CPU = ["runtime.device=cpu", "runtime.threads=1", "runtime.precision=fp32", "runtime.workers=0"]


@pytest.mark.parametrize("task", ["multicrop", "flow"])
def test_evaluate_finds_what_the_run_found(task, place):
    run("evaluate", [f"run_dir={task}", f"output={task}_found", "batch_size=3", *ON_CPU], place)
    found = read_json(place / f"{task}_found/metrics.json")
    last = {row["step"]: row for row in rows(place / task / "metrics.jsonl", "evaluate")}[found["step"]]
    # What is exported is judged: the average where there is one of it, else the network itself.
    judged = last["loss"] if task == "multicrop" else last["ema/loss"]
    assert found["loss"] == pytest.approx(judged, rel=1e-5)
    assert ("ema/loss" in last) == (task != "multicrop")


def test_the_teacher_is_exported_and_the_student_is_checkpointed(place):
    exported = load_file(place / "multicrop/weights/best_weights.safetensors")
    checkpoint = place / "multicrop/checkpoints/step_00000003"
    weights, rest = (load_file(checkpoint / f"{name}.safetensors") for name in ("weights", "task"))
    assert_same_tensors(exported, weights)
    assert {name.partition(".")[0] for name in rest} == {"student", "centre", "outputs"}
    assert not torch.equal(rest["student.head.weight"], exported["head.weight"])
    last = place / "multicrop/weights/last_weights.safetensors"
    assert last.samefile(checkpoint / "weights.safetensors")  # linked, not written twice
    assert read_weights(last)[1]["step"] == 3


def test_init_from_reaches_the_teacher_too(place):
    """The teacher is a copy that the constructor made: it must not stay random."""
    settings = [*OVERRIDES, "init_from=multicrop", "run_dir=again", "loop.total_steps=1", "optim.lr=1e-12"]
    run("tests.tasks.multicrop", settings, place)
    before = load_file(place / "multicrop/weights/last_weights.safetensors")
    after = load_file(place / "again/weights/last_weights.safetensors")
    for name in before:
        if not name.startswith("head."):
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def test_a_frozen_network_is_not_checkpointed_and_a_changed_one_is_refused(place):
    checkpoint = place / "flow/checkpoints/step_00000003"
    names = {name for file in checkpoint.glob("*.safetensors") for name in load_file(file)}
    assert not any("encoder" in name for name in names) and "velocity.label.weight" not in names  # bare names
    assert "label.weight" in load_file(checkpoint / "weights.safetensors")
    state = read_json(checkpoint / "state.json")
    metadata = read_weights(place / "flow/weights/best_weights.safetensors")[1]
    assert state["fingerprints"]["frozen.encoder"] == metadata["frozen"]["encoder"]
    changed = shutil.copytree(place / "flow", place / "changed") / "checkpoints/step_00000003"
    state["fingerprints"]["frozen.encoder"] = "another"
    replace_state(changed, json.dumps(state))
    with refuses(r"^resume: .*\n  frozen\.encoder: "):
        run("tests.tasks.flow", [*OVERRIDES, "run_dir=changed", "loop.ema_decay=0.9", "loop.total_steps=4"], place)


def test_evaluation_compares_the_frozen_networks_and_an_export_does_not_load_them(place, tmp_path):
    tensors, metadata = read_weights(place / "flow/weights/best_weights.safetensors")
    path = tmp_path / "other.safetensors"
    write_weights(path, tensors, {**metadata, "frozen": {"encoder": "another", "critic": "which only training needs"}})
    assert open_weights(path).task.encoder is None
    with refuses(r"other\.safetensors was trained with another frozen encoder;"):
        open_weights(path, "evaluation")
    write_weights(path, tensors, {**metadata, "frozen": {**metadata["frozen"], "critic": "which only training needs"}})
    assert open_weights(path, "evaluation").task.encoder is not None


def test_what_a_task_has_no_output_for_is_refused(place):
    with refuses(r"^format: onnx is no format of flow/"):
        run("export", ["run_dir=flow", "format=onnx"], place)
    with refuses(r"^output: .* predicts vectors"):
        run("predict", ["weights=multicrop", "input=images/val", "output=features.csv", "device=cpu"], place)


def test_a_weight_file_without_a_fact_of_its_kind_is_refused(place, tmp_path):
    tensors, metadata = read_weights(place / "flow/weights/best_weights.safetensors")
    del metadata["class_names"]
    write_weights(tmp_path / "without.safetensors", tensors, metadata)
    with refuses(r"without\.safetensors has wrong metadata \(class_names: none\)"):
        open_weights(tmp_path / "without.safetensors")
