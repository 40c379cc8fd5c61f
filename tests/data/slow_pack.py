"""SDXL trains on shards as on files."""

import pytest

from tests.data.test_pack import place  # noqa: F401 (a fixture)
from tests.in_process import run
from tests.support import TINY, assert_same_rows


def test_sdxl_on_shards_has_the_latents_and_figures_of_files(place, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("diffusers")
    own = [*TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.total_steps=2"]
    own += ["loop.global_batch_size=8", "loop.batch_size=4", "loop.log_every_steps=1", "task.latent_cache=latents"]
    for name in ("packed", "files"):  # the second finds all latents
        run("finetune_sdxl", [*own, f"data.root={place / name}", f"run_dir={name}"], tmp_path)
        monkeypatch.setattr("engine.tasks.diffusion_kind.encode_images", lambda *_: pytest.fail("encoded again"))
    assert_same_rows(tmp_path / "files", tmp_path / "packed", tolerance=0)
