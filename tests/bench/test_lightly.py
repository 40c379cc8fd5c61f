"""What the bench hands to LightlyTrain, and what it refuses; nothing is installed or trained here."""

import json
import subprocess
import sys

import pytest

from bench import lightly
from tests.support import ROOT


@pytest.fixture
def images(tmp_path):
    """A list of 300 images, which need not exist: LightlyTrain reads them."""
    return lightly.write_image_list([tmp_path / f"{number}.png" for number in range(300)], tmp_path / "images.txt")


@pytest.mark.parametrize("method", lightly.METHODS)
def test_the_arguments_are_plain_values_and_mirror_nothing(method, images, tmp_path):
    arguments = lightly.pretrain_arguments(lightly.Training(method, images, in_channels=1), tmp_path / "run", 10)
    assert json.loads(json.dumps(arguments)) == arguments
    transform = arguments["transform_args"]
    assert transform["random_flip"] is None
    assert transform["image_size"] == [32, 32]
    assert transform["normalize"] == {"mean": [0.5], "std": [0.5]}
    assert arguments["method"] == method and arguments["trainer_args"]["max_steps"] == 10


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_epochs_are_enough_for_the_steps_of_full_batches(steps, epochs, images, tmp_path):
    training = lightly.Training("simclr", images, changes={"batch_size": 128})  # two full batches of 300
    assert lightly.pretrain_arguments(training, tmp_path, steps)["epochs"] == epochs


def test_changes_replace_a_methods_settings(images, tmp_path):
    training = lightly.Training("simclr", images, changes={"optim_args": {"lr": 0.1}, "precision": "bf16-mixed"})
    arguments = lightly.pretrain_arguments(training, tmp_path, 1)
    assert arguments["optim_args"] == {"lr": 0.1} and arguments["precision"] == "bf16-mixed"
    assert arguments["transform_args"]["random_flip"] is None


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"method": "mae"}, 1, "method=mae is not one of simclr, dino"),
        ({}, 0, "steps=0 is not a number above 0"),
        ({"changes": {"batch_size": 512}}, 1, "300 images do not fill one batch of 512"),
    ],
)
def test_what_cannot_train_is_refused(changes, steps, message, images, tmp_path):
    training = lightly.Training("simclr", images)._replace(**changes)
    with pytest.raises(SystemExit, match=f"^lightly: {message}"):
        lightly.pretrain_arguments(training, tmp_path, steps)


def test_an_empty_list_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no image"):
        lightly.write_image_list([], tmp_path / "images.txt")


def test_the_list_has_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = lightly.write_image_list(["a/1.png"], tmp_path / "new" / "images.txt")
    assert file.read_text() == f"{tmp_path / 'a/1.png'}\n"


def test_a_step_is_its_batch_and_the_wait_before_it():
    rows = [
        {"step": 0, "profiling/batch_time": 5.0},
        {"step": 1, "profiling/batch_time": 2.0, "profiling/data_time": 0.5},
        {"step": 2, "train_loss": 1.0},
        {"step": 2, "profiling/batch_time": 3.0, "profiling/data_time": 0.25},
    ]
    assert lightly.step_seconds(rows) == [5.0, 2.5, 3.25]
    assert lightly.mean_seconds([9.0] * lightly.WINDOW + [1.0, 2.0]) == 1.5
    assert lightly.mean_seconds([9.0, 1.0]) == 5.0


def test_only_an_earlier_run_is_removed(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, name in ((run, "settings.json"), (other, "notes.txt")):
        folder.mkdir()
        (folder / name).touch()
    lightly.clear(run)
    lightly.clear(tmp_path / "absent")
    assert not run.exists()
    with pytest.raises(SystemExit, match="holds other things than an earlier run"):
        lightly.clear(other)
    assert (other / "notes.txt").exists()


def test_an_environment_that_is_ready_is_used_and_another_folder_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a command was run"))
    ready, other = tmp_path / "ready", tmp_path / "other"
    for path in (ready / "bin/python", ready / lightly.READY, other / "notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert lightly.ensure_environment(ready) == ready / "bin/python"
    with pytest.raises(SystemExit, match="holds other things than a virtual environment"):
        lightly.ensure_environment(other)


def test_a_failing_command_ends_the_bench_with_its_last_lines(tmp_path):
    command = [sys.executable, "-c", "print('no matching distribution'); raise SystemExit(3)"]
    with pytest.raises(SystemExit, match=r"^lightly: pip ended with status 3 (?s:.*)no matching distribution"):
        lightly.run_quietly(command, tmp_path / "log.txt", "pip")


def test_the_program_starts_without_the_project(tmp_path):
    """It needs the standard library alone up to `import lightly_train`, and bench/ does not hide `lightly` from it."""
    settings = tmp_path / "settings.json"
    settings.write_text("{}")
    done = subprocess.run([sys.executable, "-I", lightly.__file__, settings], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "No module named 'lightly_train'" in done.stderr
