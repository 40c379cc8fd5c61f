"""A run folder's copy in a store."""

import shutil

from tests.in_process import TINY, make_images, run


def test_an_empty_machine_goes_on_and_a_store_that_is_away_is_a_warning(tmp_path, monkeypatch):
    make_images(tmp_path / "images")
    words = [*TINY, "data.root=images", "run_dir=run", "loop.checkpoint_mirror=memory://runs"]
    run("finetune", words, tmp_path)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.put_file", None)
    run("finetune", words, tmp_path)
    said = (tmp_path / "run/log.txt").read_text()
    assert "resumed from run/checkpoints/step_00000002" in said and "step_00000002 is not copied" in said
