"""dry_run=true shows what is trained: plots/samples_seen.png, and the samples in it are those of the run."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.load import load_collection
from data.open import Data
from engine.tasks.kind import open_kind
from engine.update.runtime import start_machine
from tests.in_process import TINY, configure, make_images, run, working_in
from tests.support import TINY as TINY_TASKS

SHORT = ["loop.total_steps=2", "loop.batch_size=4", "loop.micro_batch_size=2", "runtime.device=cpu"]
SHORT += ["runtime.workers=0", "data.root=images"]
CACHED = [
    "task.latent_cache=latents",
    "task.text_cache=texts",
    "task.text_variants=3",
    "task.captions.caption_dropout=0.3",
]
SHOWN = {
    "classification": ("train", [*TINY, "task.mixup_alpha=0.8"]),
    "tagging": ("train", [*TINY, "task=tagging", "task.min_count=1", "augment.on_device=true"]),
    "fcmae": ("pretrain_fcmae", [*TINY, "loop.phases=[{fraction: 0.5, image_size_hw: [12, 12]}]"]),
    "diffusion": ("finetune_sdxl", [*TINY_TASKS["diffusion"], *SHORT, *CACHED, "task.chunk=2"]),
    "autoencoder": ("finetune_vae", [*TINY_TASKS["autoencoder"], *SHORT, "task.chunk=2"]),
}


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder of images, one of which is unreadable."""
    make_images(folder / "images")
    (folder / "images/train/A/bad.png").write_bytes(b"no image")
    (folder / "images/train/A/bad.txt").write_text("tag 1, $x^2$ <b> " + "中文 long " * 200)
    return folder


@pytest.mark.parametrize("task", SHOWN)
def test_a_dry_run_shows_the_first_samples_and_writes_nothing_else(task, place):
    script, words = SHOWN[task]
    said = run(script, [*words, "data.root=images", f"run_dir={task}", "dry_run=true"], place)
    tables = ["buckets.csv"] * (task in ("diffusion", "autoencoder"))
    assert sorted(file.name for file in (place / task).rglob("*.*")) == [*tables, "samples_seen.png"]
    assert "samples_seen.png" in said
    picture = np.asarray(Image.open(place / task / "plots/samples_seen.png"))
    assert min(picture.shape[:2]) > 4 * 258 and not any((place / name).exists() for name in ("latents", "texts"))


def test_what_a_dry_run_shows_is_what_a_run_with_caches_trains(place):
    """The crops, mirror images and texts of the caches, without the networks that fill them."""
    from sdxl.files.family import ENCODERS
    from sdxl.networks import open_networks
    from sdxl.step import encode_captions, encode_images

    config, _ = configure(*SHOWN["diffusion"])
    with working_in(place):
        kind, collection, machine = open_kind("diffusion"), load_collection(config.data), start_machine(config.runtime)
        setup = kind.set_up(config, collection)
        source, made = kind.source(collection, config.data, setup, repeats=True), {}
        for dry_run in (True, False):
            data = Data(collection, source, machine, seed=0, batch_size=2, run_path=None, dry_run=dry_run)
            made[dry_run] = kind.streams(data, setup, config).train
        shown, trained = made[True].show(4, 2, 1), made[False].steps(0, 4, 2)
        (vae, *encoders), dropped = open_networks(config.model, ("vae", *ENCODERS), frozen=True).values(), 0
        for _, batches in zip(range(3), trained):
            for theirs in batches:
                ours = next(shown)
                for name in ("sample_id", "key", "weight", "fit", "is_dropped"):
                    assert torch.equal(ours[name], theirs[name]), name
                torch.testing.assert_close(encode_images(vae, ours["images"])[0].half(), theirs["latent_mean"])
                text, ends = bytes(ours["text"].tolist()), ours["text_offsets"].tolist()
                texts = [text[first:end].decode() for first, end in zip(ends, ends[1:])]
                embeds, _ = encode_captions(encoders, texts, theirs["prompt_embeds"].shape[1] // 77, emphasis=False)
                torch.testing.assert_close(embeds.half().float(), theirs["prompt_embeds"])
                dropped += int(ours["is_dropped"].sum())
    assert dropped > 0
