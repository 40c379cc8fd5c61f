"""What users give to finetune_sdxl.py that is wrong or odd: the message and the exit status, or the warning by name."""

import pytest

pytest.importorskip("diffusers", reason="make install-sdxl")

from tests.in_process import run, run_command
from tests.support import TINY, make_collection, refuses
from utils.ranks.distributed import RANKS_VARIABLE

SHORT = [
    *TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.total_steps=1",
    "loop.batch_size=4", "data.root=images",
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    make_collection(tmp_path / "images", per_class=3, validation=1)
    return tmp_path


def train(place, *overrides, run_dir="run"):
    run("finetune_sdxl", [*SHORT, f"run_dir={run_dir}", *overrides], place)
    return (place / run_dir / "log.txt").read_text()


def refused(place, monkeypatch, capsys, *overrides):
    """Return the message of a command that ends with status 2 and leaves no run."""
    assert run_command("finetune_sdxl", [*SHORT, "run_dir=run", *overrides], place, monkeypatch) == 2
    assert not (place / "run/checkpoints").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words, key",
    [
        (["task.samples.image_size_hw=[130,130]"], "task.samples.image_size_hw"),
        (["task.samples.steps=1001"], "task.samples.steps"),
        (["task.samples.prompts=[a,{text: b, sede: 1}]"], "task.samples.prompts.1.sede: unknown key; close: "),
        (["init_from=x"], "init_from"),
        (["loop.sampling=balanced"], "loop.sampling: balanced"),
        (["optim.rules=[{match: nothing.*, lr_scale: 0.5}]"], "optim.rules"),
        (["loop.batch_size=5"], "loop.batch_size"),
        (["task.timesteps.range=[500,500]"], "task.timesteps.range"),
        (["task.preserve={weight: 1.0, prompt: null}"], "task.preserve"),
        (["task.lora.kind=loha", "task.lora.rank_dropout=0.1"], "task.lora.rank_dropout"),
    ],
)
def test_what_can_be_checked_is_checked_before_images_are_encoded(words, key, place, monkeypatch, capsys):
    """Here as one of two ranks."""
    monkeypatch.setattr("utils.ranks.distributed.world_size", lambda: 2)
    monkeypatch.setenv(RANKS_VARIABLE, "2")
    for more in ([], ["dry_run=true"]):
        caches = ["task.latent_cache=latents", "task.text_cache=texts", "task.text_variants=2"]
        assert key in refused(place, monkeypatch, capsys, *caches, *words, *more)
        assert not (place / "latents").exists() and not (place / "texts").exists()


def test_another_recipe_is_refused_before_images_are_encoded(place):
    with refuses("buckets: no image has a bucket; 9"):
        train(place, "task.buckets.sizes_hw=[[[512,512]]]", "task.buckets.small=drop")
    train(place)
    with refuses("task.loss.gamma"):
        train(place, "task.loss.gamma=3.0", "task.latent_cache=latents")
    assert not (place / "latents").exists()
