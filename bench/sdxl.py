"""Fine-tuning SDXL: what the caches gain, the step against diffusers' script, buckets, and a second start.

python bench/sdxl.py [quick]            (two minutes of a core)

The networks are those of model=sdxl_tiny, on pictures that are made here, in outputs/bench/sdxl/. All work on a
CPU is one thread's, and its time is CPU seconds, so that other processes of the machine count little.

cached, on the fly: the loop itself with its loader; the latents and texts are read from the caches, or the files are
decoded and encoded at each step. The other side of the step is one update as diffusers' training script makes it, with
its own schedulers and accelerate, on a batch in memory. The other side of reading is one uncompressed .npz file per
image, as sd-scripts keeps latents; it has the same tensors, in the page cache. The other side of the buckets is a loop
over the images as sd-scripts has it.

Source of the order of an update: huggingface/diffusers:examples/text_to_image/train_text_to_image_sdxl.py main.
"""

import copy
import itertools
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from hydra import compose, initialize_config_dir
from PIL import Image
from torch.nn import functional as F

from bench.measure import OUT, Comparison, bench_loop, build_bench_run, run_bench
from data.buckets import SIZES, Buckets, assign, make_buckets
from data.latent_cache import LatentCache, LatentRecipe, LatentSource
from data.tensor_store import TensorStore
from engine.run import build_task
from engine.runtime import choose_runtime
from engine.tasks.diffusion import DiffusionKind
from engine.tasks.diffusion_data import HASHES
from engine.train_one_epoch import Vote, train_one_epoch
from finetune_sdxl import FinetuneSDXLConfig
from models.sdxl.sampling import scheduler_config
from utils.config.entry_point import CONF, validate
from utils.io.files import sha256_text

BATCH, LEARNING_RATE, CLIP = 4, 1e-4, 1.0
WORDS = [
    "model=sdxl_tiny", "runtime=reference", "runtime.deterministic=false", "runtime.threads=1",
    f"loop.batch_size={BATCH}", f"task.chunk={BATCH}", "task.caption_chunks=1",
]  # fmt: skip
CACHED = ["task.latent_cache=latents", "task.text_cache=texts"]
ON_THE_FLY = ["task.latent_cache=null", "task.text_cache=null"]
SHAPES = [(1.0, 1.0), (1.15, 0.85), (0.85, 1.15)]  # of pictures: their sides, in parts of the bucket's


def configure(*words):
    """Return the configuration of finetune_sdxl.py."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose("finetune_sdxl", overrides=[*WORDS, *words]), FinetuneSDXLConfig)


def pictures(folder, count, side_px):
    """Make pictures with captions; returns the words that choose them and their buckets."""
    folder.mkdir()
    for number in range(count):
        draw, (height, width) = np.random.default_rng(number), SHAPES[number % len(SHAPES)]
        colours = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        size = round(1.1 * side_px * width), round(1.1 * side_px * height)
        colours.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        (folder / f"{number}.txt").write_text(f"made picture {number}, soft colours, shape {number % len(SHAPES)}")
    sides = f"task.buckets.min_px={side_px // 2}", f"task.buckets.max_px={side_px * 2}", "task.buckets.max_crop=0.9"
    return [f"data.root={folder}", f"task.buckets.area_px={side_px**2}", "task.buckets.step_px=32", *sides]


def start(config):
    """Open the data of a run, as its start does; returns the setup and the endless stream of steps."""
    kind = DiffusionKind()
    data = kind.pipeline.open_training(config, choose_runtime(config.runtime), None)
    setup = kind.set_up(config, data.collection)
    plan = SimpleNamespace(world_size=1, global_batch_size=BATCH, micro_batch_size=BATCH, accum_steps=1)
    return setup, kind.pipeline.streams(data, setup, config).train.steps(0, plan)


def make_task(config, setup):
    """Return the task with its frozen networks."""
    return build_task(lambda: DiffusionKind().build(setup), config)


def loop_turn(task, stream, steps):
    """Return a function that makes `steps` updates by the loop of every entry point."""
    run = build_bench_run(
        task, batch_size=BATCH, epoch_steps=steps, loop={"clip_grad_norm": CLIP},
        runtime={"device": "auto", "deterministic": False, "threads": 1},
    )  # fmt: skip
    epochs, vote = itertools.count(), Vote()
    return lambda: train_one_epoch(run, stream, bench_loop(), next(epochs), vote)


class DiffusersScript:
    """diffusers' script with min-SNR and v-prediction, without its progress bar; a call makes `steps` updates."""

    def __init__(self, task, batch, steps, *, fused):
        self.steps, self.accelerator = steps, Accelerator(gradient_accumulation_steps=1)
        unet = copy.deepcopy(task.unet).to(self.accelerator.device).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2, fused=fused or None)
        schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10**6)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet, optimizer, schedule)
        self.noise = DDPMScheduler.from_config(scheduler_config("v_prediction", zero_terminal_snr=True))
        self.latents = batch["latent_mean"].float() * task.latent_scale
        self.prompts, self.pooled = batch["prompt_embeds"], batch["pooled_prompt_embeds"]
        self.fits = batch["fit"].tolist()

    def __call__(self):
        for step in range(self.steps):
            self.update(step)

    def update(self, step):
        """Make one update."""
        latents, device = self.latents, self.accelerator.device
        with self.accelerator.accumulate(self.unet):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.noise.config.num_train_timesteps, (len(latents),), device=device)
            noisy = self.noise.add_noise(latents, noise, timesteps)
            ids = torch.cat([torch.tensor([fit], dtype=torch.float32, device=device) for fit in self.fits])
            added = {"time_ids": ids, "text_embeds": self.pooled}
            pred = self.unet(noisy, timesteps, self.prompts, added_cond_kwargs=added, return_dict=False)[0]
            snr = compute_snr(self.noise, timesteps)
            weight = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / (snr + 1)
            wanted = self.noise.get_velocity(latents, noise, timesteps)
            error = F.mse_loss(pred.float(), wanted.float(), reduction="none").mean(dim=(1, 2, 3))
            loss = (error * weight).mean()
            mean = self.accelerator.gather(loss.repeat(len(latents))).mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.unet.parameters(), CLIP)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.accelerator.log({"train_loss": mean}, step=step)
        return loss.detach().item(), self.schedule.get_last_lr()[0]


def compare_steps(quick, clock):
    """Yield the comparison of cached training with that on the fly, and that of the step with diffusers'."""
    side_px, steps = (64, 1) if quick else (256, 4)
    found, sides = pictures(Path("pictures"), 48, side_px), {}
    for name, cache in (("cached", CACHED), ("on the fly", ON_THE_FLY)):
        config = configure(*found, *cache)
        setup, stream = start(config)
        sides[name] = loop_turn(make_task(config, setup), stream, steps)
    yield Comparison(f"LoRA, {BATCH} x {side_px} px", sides, steps, clock=clock)
    config = configure(*found, *CACHED, "task.lora=null")
    setup, stream = start(config)
    (batch,), task = next(stream), make_task(config, setup)
    sides = {
        "atelier": loop_turn(task, itertools.repeat([batch]), steps),
        "diffusers": DiffusersScript(task, batch, steps, fused=False),
        "diffusers fused": DiffusersScript(task, batch, steps, fused=True),
    }
    yield Comparison(f"step of the whole U-Net, {BATCH} x {side_px} px", sides, steps, clock=clock)


def compare_reads(buckets, side_px, count):
    """Return the comparison of reading latents: of the cache, and of one .npz file per image."""
    size = np.full((count, 2), side_px)
    found = Buckets(np.arange(count), np.zeros(count, dtype=np.int64), size[:1], size, {})
    hashes = [sha256_text(str(number)) for number in range(count)]
    store, folder = TensorStore(Path(f"latents_{side_px}"), "bench"), Path(f"npz_{side_px}")
    cache = LatentCache(store, None, found, buckets, LatentRecipe("made", None), hashes)
    folder.mkdir()
    for number, key in enumerate(cache.keys[:, 0]):
        draw, shape = torch.Generator().manual_seed(number), (4, side_px // 8, side_px // 8)
        record = {name: torch.randn(shape, generator=draw).half() for name in ("latent_mean", "latent_logvar")}
        store.put(key.decode(), str(number), record)
        arrays = {name: tensor.numpy() for name, tensor in record.items()}
        np.savez(folder / f"{number}.npz", **arrays, original_size=size[0], crop_ltrb=np.zeros(4, dtype=np.int64))
    store.finish()
    source, order = LatentSource(cache), np.random.default_rng(0).permutation(count).tolist()

    def read_npz(number):
        with np.load(folder / f"{number}.npz") as file:
            latents = [torch.from_numpy(file[name]) for name in ("latent_mean", "latent_logvar")]
            return latents, file["original_size"].tolist(), file["crop_ltrb"].tolist()

    sides = {
        "cache": lambda: [source.read(number) for number in order],
        ".npz": lambda: [read_npz(number) for number in order],
    }
    return Comparison(f"latents of {side_px} px", sides, count, clock=time.process_time)


def common_sizes(count):
    """Return sizes [N, 2]: 85 % of the common ratios of photographs, the others of any."""
    draw = np.random.default_rng(0)
    common = draw.choice([1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16], count)
    ratios = np.where(draw.random(count) < 0.85, common, np.exp(draw.normal(0, 0.3, count)).clip(1 / 4, 4))
    return np.round(2048 * np.stack([np.sqrt(ratios), 1 / np.sqrt(ratios)], axis=1)).astype(np.int64)


def compare_buckets(config, count):
    """Return the comparison of finding buckets; the setting says what they cut off, and the seconds of ten times more.

    Those are of all that a start does with sizes: choosing, dropping and sorting.
    """
    many = common_sizes(10 * count)
    collection = SimpleNamespace(table=pa.table({"path": pa.array(np.arange(len(many))).cast(pa.string())}))
    started = time.process_time()
    made = make_buckets(collection, np.arange(len(many)), many, config)
    seconds, sizes, buckets = time.process_time() - started, many[:count], config.sizes()
    ratios = buckets[:, 1] / buckets[:, 0]

    def choose_one_by_one():
        return [int(np.abs(ratios - width / height).argmin()) for height, width in sizes.tolist()]

    target = made.sizes_hw[made.groups]
    lost = 1 - (target / (made.image_hw * (target / made.image_hw).max(axis=1, keepdims=True))).prod(axis=1)
    return Comparison(
        f"buckets of {count:,}; {len(many):,} in {seconds:.2f} s, cropped {lost.mean():.1%}, at worst {lost.max():.1%}",
        {"assign": lambda: assign(sizes, buckets), "one by one": choose_one_by_one},
        clock=time.process_time,
        facts={"sizes": len(many), "seconds": seconds, "crop_mean": lost.mean(), "crop_worst": lost.max()},
    )


def compare_starts(count):
    """Return the comparison of a second start with one that reads the sizes and the contents of all files again."""
    config = configure(*pictures(Path("many_pictures"), count, 64), *CACHED)
    started = time.process_time()
    next(start(config)[1])
    seconds = time.process_time() - started

    def start_anew():
        SIZES.unlink()
        HASHES.unlink()
        next(start(config)[1])

    return Comparison(
        f"start, {count:,} images; the first took {seconds:.0f} s",
        {"second": lambda: next(start(config)[1]), "files read": start_anew},
        warmup=0,
        facts={"first_start_seconds": seconds},
        clock=time.process_time,
    )


def comparisons(device, quick):
    """Yield all comparisons."""
    folder = OUT / "sdxl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)  # the pipeline's own caches are in outputs/ of the working directory
    torch.set_num_threads(1)
    yield from compare_steps(quick, None if device.type == "cuda" else time.process_time)
    buckets = configure("data.root=.").task.buckets
    for side_px in (256, 1024):
        yield compare_reads(buckets, side_px, 16 if quick else 512)
    yield compare_buckets(buckets, 1000 if quick else 100_000)
    yield compare_starts(100 if quick else 10_000)


if __name__ == "__main__":
    run_bench(comparisons, turns=3)
