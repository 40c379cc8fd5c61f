"""Commands with dry_run=true: they open what they were given, and leave nothing behind."""

import pytest

from tests.in_process import TINY, make_images, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a run in run/, its images in images/."""
    folder = tmp_path_factory.mktemp("trained")
    run("finetune", [*TINY, f"data.root={make_images(folder / 'images')}", "run_dir=run"], folder)
    return folder


COMMANDS = {
    "evaluate": (["run_dir=run", "runtime.device=cpu"], "dry run: nothing is measured"),
    "export": (["run_dir=run"], "dry run: nothing is written"),
    "predict": (["weights=run", "input=images", "output=found.csv"], "dry run: 12 images, nothing is predicted"),
    "prepare": (["job=manifest", "data=image_folder", "data.root=images"], "dry run: nothing is written"),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_dry_run_opens_what_it_was_given_and_writes_nothing(script, trained):
    words, said = COMMANDS[script]
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert run(script, [*words, "dry_run=true"], trained) == said
    after = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert {path for path in after.keys() - before.keys() if "cache" not in path.parts} == set()
    assert all(after[path] == time for path, time in before.items())
