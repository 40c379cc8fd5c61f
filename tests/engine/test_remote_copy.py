"""A run folder's copy in a store."""

import shutil

import pytest

from tests.in_process import TINY, make_images, run
from tests.support import contents
from utils.errors import UserError
from utils.io.files import read_json

LONGER = ["loop.total_steps=4"]


def words(name, store="memory://runs"):
    return [*TINY, "data.root=images", f"run_dir={name}", f"loop.checkpoint_mirror={store}"]


@pytest.fixture
def place(tmp_path):
    make_images(tmp_path / "images")
    return tmp_path


def test_an_empty_machine_goes_on_and_a_store_that_is_away_is_a_warning(place, monkeypatch):
    run("finetune", words("run"), place)
    shutil.rmtree(place / "run")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.put_file", None)
    run("finetune", words("run"), place)
    text = (place / "run/log.txt").read_text()
    assert "resumed from run/checkpoints/step_00000002" in text and "step_00000002 is not copied" in text


@pytest.mark.parametrize("name", ["exp[1]", "a::b"])
def test_a_name_is_no_pattern_and_the_store_may_be_a_folder(name, place):
    run("finetune", words(name, "store"), place)
    shutil.rmtree(place / name)
    run("finetune", [*words(name, "store"), *LONGER], place)
    assert f"resumed from {name}/checkpoints/step_00000002" in (place / name / "log.txt").read_text()


def test_another_run_of_the_same_name_overwrites_nothing(place):
    run("finetune", words("run", "store"), place)
    shutil.rmtree(place / "run")
    run("finetune", [*words("run", "other"), "seed=1", "loop.total_steps=1"], place)
    before = contents(place / "run", "*.json*")
    with pytest.raises(UserError, match="seed: 0 in the run, 1 now"):
        run("finetune", [*words("run", "store"), "seed=1"], place)
    assert contents(place / "run", "*.json*") == before


def test_a_run_whose_copy_another_machine_took_over_ends(place, monkeypatch):
    run("finetune", words("run", "store"), place)
    monkeypatch.setattr("engine.run.remote_copy.RemoteCopy.fetch", lambda copy, check: None)
    (place / "store/run/.owner").write_text("/run on elsewhere")
    with pytest.raises(UserError, match="loop.checkpoint_mirror.*elsewhere"):
        run("finetune", [*words("run", "store"), *LONGER], place)
    assert read_json(place / "run/checkpoints/step_00000004/state.json")["step"] == 4
    assert not (place / "store/run/checkpoints/step_00000004").exists()


def test_a_copy_inside_the_run_folder_is_refused(place):
    with pytest.raises(UserError, match="loop.checkpoint_mirror: run/copy is inside the run folder"):
        run("finetune", words("run", "run/copy"), place)
