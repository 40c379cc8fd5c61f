"""Smaller images in the first updates of a run (`loop.phases`)."""

import pytest

from engine.update.learner import Learner
from tests.in_process import TINY, check_resumption, make_images, run
from tests.support import common
from utils.errors import UserError

BUCKETS = [
    "task.buckets.sizes_hw=null", "task.buckets.step_px=32", "task.buckets.areas_px=[9216]",
    "task.buckets.min_px=96", "task.buckets.max_crop=1.0", "task.buckets.max_upscale=9", "task.chunk=2",
]  # fmt: skip
RUNS = {  # script, words, and the sides of the images or latents of each update
    "classification": (
        "finetune",
        ["augment.image_size_hw=[32,32]", "loop.phases=[{fraction: 0.25, image_size_hw: [16, 16]}, "
         "{fraction: 0.25, image_size_hw: [24, 24]}]", "augment.on_device=true"],
        [16] * 2 + [24] * 2 + [32] * 4,
    ),
    "vit": (
        "finetune",
        ["model=timm", "model.name=vit_tiny_patch16_224", "model.image_size_hw=[48,48]",
         "augment.image_size_hw=[48,48]", "loop.phases=[{fraction: 0.5, image_size_hw: [32, 32]}]"],
        [32] * 4 + [48] * 4,
    ),
    "diffusion": (
        "finetune_sdxl",
        [*BUCKETS, "task.latent_cache=latents", "loop.phases=[{fraction: 0.5, areas_px: [4096]}]"],
        [8] * 4 + [12] * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", RUNS)
def test_sizes_follow_each_other_and_a_run_killed_at_a_boundary_resumes_exactly(task, tmp_path, monkeypatch):
    if task == "diffusion":
        pytest.importorskip("diffusers", reason="make install-sdxl")
    script, words, expected = RUNS[task]
    words = [
        *words,
        "loop.total_steps=8",
        "loop.batch_size=2",
        "loop.micro_batch_size=2",
        "loop.checkpoint_every_steps=2",
        "loop.evaluate_every_epochs=0.25",
    ]
    make_images(tmp_path / "images")
    update, sides = Learner.update, []

    def see(learner, batches):
        first = batches[0]
        sides.append(max(first["images" if "images" in first else "latent_mean"].shape[-2:]))
        return update(learner, batches)

    monkeypatch.setattr(Learner, "update", see)
    base = common(task.replace("vit", "classification"), "images", "run")
    if task == "vit":
        base = [word for word in base if not word.startswith("model")]
    check_resumption(script, [*base, *words], tmp_path, killed_at=4, steps=8)
    assert sides[:8] == expected and sides[8:] == expected


WRONG = {
    "[{fraction: 1.0, image_size_hw: [8, 8]}]": "loop.phases: the fractions add up to 1;",
    "[{fraction: 0.5}]": "loop.phases.0: ",
    "[{fraction: 0.5, areas_px: [4096]}]": "loop.phases.0: ",
    "[{fraction: 0.5, mixup: 0.1}]": "loop.phases.0.mixup: unknown key",
    "[{fraction: 0.5, image_size_hw: [18, 18]}]": "augment.image_size_hw: [18, 18] is not a multiple",
    "[{fraction: 0.5, image_size_hw: [64, 64]}] augment.shrink=true": "augment.shrink: ",
}


@pytest.mark.parametrize("phases", WRONG)
def test_phases_that_cannot_be(phases, collection, tmp_path):
    value, *more = phases.split(" augment", 1)
    words = [f"loop.phases={value}", *(f"augment{word}" for word in more)]
    with pytest.raises(UserError) as refused:
        run("finetune", [*TINY, f"data.root={collection}", "run_dir=refused", "dry_run=true", *words], tmp_path)
    assert WRONG[phases] in str(refused.value)
