"""A stranger's task, tests/tasks/multicrop.py, under every script: initial weights, what is judged, exported and saved.

Exact resume and ranks: test_exactness.py.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.in_process import SHORT, make_images, run
from tests.support import assert_same_tensors, refuses, rows
from utils.io.files import read_json
from utils.io.weights import read_weights

OVERRIDES = [*SHORT, "data.root=images", "augment.image_size_hw=[32,32]", "loop.total_steps=3"]
ON_CPU = ["runtime.device=cpu", "runtime.threads=1", "runtime.precision=fp32", "runtime.workers=0"]


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with images and a run, with an average of what is not exported."""
    make_images(folder / "images")
    run("tests.tasks.multicrop", [*OVERRIDES, "run_dir=multicrop", "loop.ema_decay=0.9"], folder)
    return folder


def test_evaluate_finds_what_the_run_found(place):
    """What is exported is judged: the teacher, which has no average."""
    run("evaluate", ["run_dir=multicrop", "output=found", "batch_size=3", *ON_CPU], place)
    found = read_json(place / "found/metrics.json")
    last = {row["step"]: row for row in rows(place / "multicrop/metrics.jsonl", "evaluate")}[found["step"]]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5) and "ema/loss" not in last


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


def test_what_a_task_has_no_output_for_is_refused(place):
    with refuses(r"^format: wd14 is no format of multicrop/"):
        run("export", ["run_dir=multicrop", "format=wd14"], place)
    with refuses(r"^output: .* predicts vectors"):
        run("predict", ["weights=multicrop", "input=images/val", "output=features.csv", "device=cpu"], place)
