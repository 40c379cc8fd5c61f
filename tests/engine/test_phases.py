"""Phases of a run (`loop.phases`): sizes, micro-batches, mixing and frozen parameters by share of the updates."""

import pytest
import torch

from engine.plan import Plan
from engine.update.learner import Learner
from tests.in_process import TINY, configure, make_images, run, run_until_killed
from tests.support import assert_same_rows, checkpoint_tensors, common, rows, samples_by_step
from tests.support import run as run_as_process
from utils.config.messages import ConfigError
from utils.errors import UserError

PHASES = (
    "loop.phases=[{fraction: 0.5, image_size_hw: [16, 16], micro_batch_size: 8, mix_probability: 0.0, "
    "frozen: ['network.stages.0.*']}, {fraction: 0.25, image_size_hw: [24, 24]}, {fraction: 0.25, random_erasing: 0.5}]"
)
SHORT = [
    "loop.total_steps=16", "loop.batch_size=8", "loop.micro_batch_size=4", "task.mixup_alpha=0.8",
    "augment.on_device=true", PHASES,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(collection, tmp_path_factory):
    """The folder of an undisturbed run: phases begin at steps 0, 8 and 12."""
    folder = tmp_path_factory.mktemp("phases") / "whole"
    run("finetune", overrides(collection, folder), folder.parent)
    return folder


def overrides(collection, folder, *more):
    words = [
        *SHORT,
        "loop.checkpoint_every_steps=3",
        "loop.keep_checkpoints=9",
        "loop.evaluate_every_epochs=0.3",
        *more,
    ]
    return common("classification", collection, folder, *words)


@pytest.mark.parametrize("killed_at", [8, 13])
def test_a_run_killed_at_a_boundary_resumes_exactly(killed_at, whole, collection, tmp_path):
    words = overrides(collection, tmp_path / "killed")
    run_until_killed("finetune", words, tmp_path, step=killed_at)
    run("finetune", words, tmp_path)
    first, second = (checkpoint_tensors(folder, 16) for folder in (whole, tmp_path / "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert rows(whole / "metrics.jsonl") == rows(tmp_path / "killed/metrics.jsonl")


def test_a_phase_has_its_size_micro_batch_mixing_and_frozen_parameters(whole, collection, tmp_path, monkeypatch):
    seen = []

    def forward(task, batch, progress):
        seen.append((*batch["images"].shape[:1], batch["images"].shape[-1], task.mixing.is_on))
        return original(task, batch, progress)

    from engine.tasks.classification import ClassificationTask

    original = ClassificationTask.forward
    monkeypatch.setattr(ClassificationTask, "forward", forward)
    run("finetune", overrides(collection, tmp_path / "run"), tmp_path)
    assert seen == [(8, 16, False)] * 8 + [(4, 24, True)] * 8 + [(4, 32, True)] * 8
    early, boundary, last = (checkpoint_tensors(whole, step) for step in (3, 6, 16))
    frozen = [name for name in last if name.startswith("weights/stages.0.")]
    assert frozen and all(torch.equal(early[name], boundary[name]) for name in frozen)
    assert not all(torch.equal(last[name], boundary[name]) for name in frozen)
    best = max(row["top1"] for row in rows(whole / "metrics.jsonl", "evaluate") if row["step"] > 12)
    said = (whole / "log.txt").read_text()
    assert f"best        top-1 {best:.4g} (95 % interval: " in said and "from step 9: image_size_hw=[24, 24]" in said


def test_ranks_equal_one_process(collection, tmp_path):
    words = [word.replace("mix_probability: 0.0, ", "") for word in SHORT if "mixup" not in word]
    words += ["loop.checkpoint_every_steps=16", "optim.lr=0.001"]
    run("finetune", common("classification", collection, tmp_path / "1", *words), tmp_path)
    run_as_process("finetune.py", common("classification", collection, tmp_path / "2", *words), tmp_path, ranks=2)
    one, two = (checkpoint_tensors(tmp_path / f"{ranks}", 16) for ranks in (1, 2))
    assert all((one[name].double() - two[name].double()).abs().max() < 2e-5 for name in one if one[name].numel())
    assert samples_by_step(tmp_path / "1") == samples_by_step(tmp_path / "2")
    assert_same_rows(tmp_path / "1", tmp_path / "2")


def test_weights_are_best_from_the_last_phase_on():
    plan = Plan(1, 8, 8, 1, 64, 16, 0, 0.1, phases=((0, 8), (8, 4), (12, 4)))
    assert [step for step in range(17) if plan.may_be_best(step)] == [13, 14, 15, 16]
    assert [plan.phase_of(step) for step in (0, 7, 8, 12, 99)] == [0, 0, 1, 2, 2]
    assert Plan(1, 8, 8, 1, 64, 0, 0, 0.1).may_be_best(0)


WRONG = {
    "[{fraction: 0.5}]": "loop.phases: ... 0.5, not to 1",
    "[{fraction: 0.5}, {fraction: 0.5, image_size_hw: [8, 8]}]": "loop.phases.1.image_size_hw: ... evaluation",
    "[{fraction: 1.0, areas_px: [4096]}]": "loop.phases.0.areas_px: ... task.buckets.areas_px",
    "[{fraction: 1.0, mixup: 0.1}]": "loop.phases.0.mixup: unknown key",
    "[{fraction: 0.5, frozen: ['*']}, {fraction: 0.5}]": "loop.phases.0.frozen: freezes every parameter",
    "[{fraction: 0.5, frozen: ['stages*']}, {fraction: 0.5}]": "loop.phases.0.frozen: 'stages*' matches no ... stages",
    "[{fraction: 0.5, image_size_hw: [18, 18]}, {fraction: 0.5}]": "augment.image_size_hw: [18, 18] is not a multiple",
    "[{fraction: 0.5, image_size_hw: [64, 64]}, {fraction: 0.5}] augment.shrink=true": "augment.shrink: ",
}


@pytest.mark.parametrize("phases", WRONG)
def test_phases_that_cannot_be(phases, collection, tmp_path):
    value, _, more = phases.partition("] aug")
    words = [f"loop.phases={value}" + ("]" if more else ""), *([f"aug{more}"] if more else [])]
    with pytest.raises(UserError) as refused:
        run("finetune", [*TINY, f"data.root={collection}", "run_dir=refused", "dry_run=true", *words], tmp_path)
    for part in WRONG[phases].split(" ... "):
        assert part in str(refused.value)


def test_a_value_that_its_group_refuses_is_named():
    words = ["model=sdxl_tiny", "data.root=images", "loop.phases=[{fraction: 0.5, crop_px: 36}, {fraction: 0.5}]"]
    with pytest.raises(ConfigError, match="loop.phases.0: task.crop_px: must be a multiple of 8, found 36"):
        configure("finetune_vae", words)


BUCKETED = {  # script, task and first phase; the latents' or crops' areas in it and afterwards
    "finetune_sdxl": ("diffusion", "areas_px: [4096]", 64, ["task.latent_cache=latents"]),
    "finetune_vae": ("autoencoder", "areas_px: [4096], crop_px: 32", 1024, ["task.crop_px=64"]),
}


@pytest.mark.parametrize("script", BUCKETED)
def test_bucket_areas_are_phases_and_a_run_killed_between_them_resumes_exactly(script, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="make install-sdxl")
    task, phase, least, words = BUCKETED[script]
    words = [
        *words,
        "task.buckets.sizes_hw=null", "task.buckets.min_px=32", "task.buckets.step_px=32",
        "task.buckets.areas_px=[9216]", "task.buckets.max_crop=1.0", "task.buckets.max_upscale=9", "task.chunk=2",
        "loop.total_steps=4", "loop.batch_size=2", "loop.micro_batch_size=2", "loop.checkpoint_every_steps=2",
        f"loop.phases=[{{fraction: 0.5, {phase}}}, {{fraction: 0.5}}]",
    ]  # fmt: skip
    images, areas, update = make_images(tmp_path / "images"), [], Learner.update

    def see(learner, batches):
        areas.append(batches[0]["images" if "images" in batches[0] else "latent_mean"][0, 0].numel())
        return update(learner, batches)

    monkeypatch.setattr(Learner, "update", see)
    run(script, common(task, images, tmp_path / "whole", *words), tmp_path)
    run_until_killed(script, common(task, images, tmp_path / "killed", *words), tmp_path, step=2)
    run(script, common(task, images, tmp_path / "killed", *words), tmp_path)
    assert areas[:4] == areas[4:] and max(areas[:2]) <= least < min(areas[2:4])
    whole, killed = (checkpoint_tensors(tmp_path / name, 4) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert rows(tmp_path / "whole/metrics.jsonl") == rows(tmp_path / "killed/metrics.jsonl")
