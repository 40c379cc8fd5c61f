"""Fine-tuning SDXL: the step against diffusers' script, and the time to the first one.

python bench/sdxl.py [quick] [TEXT OF A SETTING]            (two minutes of a core; on a GPU of 80 GB, longer)

The pictures are generated in outputs/bench/sdxl/. On a CPU the networks are of model=sdxl_tiny, all work is one
thread's, and its time is CPU seconds, so that other processes of the machine count little. On a GPU they have SDXL's
own sizes, with random weights in outputs/bench/sdxl/base (7 GB), and both sides train a LoRA in bf16.

step: our loop with its loader, which reads latents and texts from the caches, beside an update as diffusers' training
script makes it, with its own schedulers and accelerate, on a batch in memory. start: `finetune_sdxl.py`, as a user
types it, from typing to the first update, with caches that it fills, over a goal of a minute.

Source of the order of an update: huggingface/diffusers:examples/text_to_image/train_text_to_image_sdxl.py main.
"""

import copy
import functools
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr
from hydra import compose, initialize_config_dir
from peft import LoraConfig
from PIL import Image
from torch.nn import functional as F

from bench.measure import OUT, Comparison, build_bench_run, compare_with_goal, run_bench
from bench.minute import run_script
from data.load import load_collection
from data.open import Data
from data.stream.batch import to_device
from engine.run.start import build_task
from engine.tasks.kinds import training_schema
from engine.update.runtime import choose_runtime
from sdxl.files.checkpoints import save_pipeline
from sdxl.files.family import draw_networks
from sdxl.files.tokenizer import build_tokenizer
from sdxl.kind import DiffusionKind
from sdxl.pictures.sampling import scheduler_config
from utils.config.entry_point import CONF, validate

BATCH = 4
LEARNING_RATE = 1e-4
CLIP = 1.0
GOAL_START_MS = 60e3
WORDS = [
    "runtime=reference", "runtime.deterministic=false", "runtime.cuda_graphs=true",
    f"loop.micro_batch_size={BATCH}", f"task.chunk={BATCH}", "task.caption_chunks=1",
    "task.noise.prediction_type=v_prediction", "task.noise.zero_terminal_snr=true",
]  # fmt: skip
TINY = ["model=sdxl_tiny", "runtime.threads=1"]
WHOLE = ["model.path=base", "runtime.precision=bf16", "task.noise.convert=true"]
CACHED = ["task.latent_cache=latents", "task.text_cache=texts"]
SHAPES = [(1.0, 1.0), (1.15, 0.85), (0.85, 1.15)]  # of pictures: their sides, in parts of the bucket's


def configure(*words):
    """Return the configuration of finetune_sdxl.py."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose("finetune_sdxl", overrides=[*WORDS, *words]), training_schema("finetune_sdxl"))


def pictures(folder, count, side_px):
    """Make pictures with captions; returns the words that choose them and their buckets."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        height, width = SHAPES[number % len(SHAPES)]
        colours = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        size = round(1.1 * side_px * width), round(1.1 * side_px * height)
        colours.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        (folder / f"{number}.txt").write_text(f"made picture {number}, soft colours, shape {number % len(SHAPES)}")
    sides = [f"task.buckets.min_px={side_px // 2}", f"task.buckets.max_px={side_px * 2}", "task.buckets.max_crop=0.9"]
    return [f"data.root={folder}", f"task.buckets.areas_px=[{side_px**2}]", "task.buckets.step_px=32", *sides]


def start(config):
    """Open the data of a run, as its start does; returns the setup and the streams."""
    kind = DiffusionKind()
    collection = load_collection(config.data)
    setup = kind.set_up(config, collection)
    source = kind.source(collection, config.data, setup, repeats=True)
    runtime = choose_runtime(config.runtime)
    size = config.loop.micro_batch_size
    data = Data(collection, source, runtime, seed=config.seed, batch_size=size, run_path=None)
    return setup, kind.streams(data, setup, config)


def make_task(config, setup):
    """Return the task with its frozen networks."""
    return build_task(lambda: DiffusionKind().build(setup), config)


def write_base(device):
    """Write a diffusers folder of SDXL's sizes with random weights, in bf16, unless an earlier call has."""
    if Path("base").exists():
        return
    with device:
        networks = draw_networks(tiny=False)
    unfinished = Path("unfinished")
    save_pipeline(
        unfinished, networks, build_tokenizer(), prediction_type="epsilon", zero_terminal_snr=False,
        dtype=torch.bfloat16, zeros_for_empty_prompt=True,
    )  # fmt: skip
    unfinished.rename("base")


def loop_turn(config, task, stream, steps):
    """Return a function that makes `steps` updates by the loop of every entry point."""
    machine = config.runtime.model_dump(include={"device", "deterministic", "threads", "precision", "cuda_graphs"})
    run = build_bench_run(
        task, batch_size=BATCH, epoch_steps=steps, loop={"clip_grad_norm": CLIP}, runtime=machine
    )  # fmt: skip
    return lambda: run.train_one_epoch(stream)


class DiffusersScript:
    """diffusers' script with min-SNR and v-prediction, without its progress bar; a call makes `steps` updates.

    It trains the whole U-Net, or where the task has a LoRA, PEFT's of the same layers and rank.
    """

    def __init__(self, config, task, batch, steps):
        precision = "bf16" if config.runtime.precision == "bf16" else "no"
        self.steps = steps
        self.accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision=precision)
        lora = config.task.lora
        if lora is not None:
            task.adapter.detach()
        unet = copy.deepcopy(task.unet).to(self.accelerator.device).train()
        if lora is not None:
            task.adapter.attach({"unet": task.unet})
            names = [name.removeprefix("unet.") for name in task.adapter.names]
            unet.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names))
            cast_training_params(unet, dtype=torch.float32)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-2, fused=True)
        schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10**6)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet, optimizer, schedule)
        self.noise = DDPMScheduler.from_config(scheduler_config("v_prediction", zero_terminal_snr=True))
        self.latents = (batch["latent_mean"].float() - task.latent_mean) * task.latent_factor
        self.prompts = batch["prompt_embeds"]
        self.pooled = batch["pooled_prompt_embeds"]
        self.fits = batch["fit"].tolist()

    def __call__(self):
        for step in range(self.steps):
            self.update(step)

    def update(self, step):
        """Make one update."""
        latents = self.latents
        device = self.accelerator.device
        with self.accelerator.accumulate(self.unet):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, self.noise.config.num_train_timesteps, (len(latents),), device=device)
            noisy = self.noise.add_noise(latents, noise, timesteps)
            ids = torch.cat([torch.tensor([fit], dtype=torch.float32, device=device) for fit in self.fits])
            added = {"time_ids": ids, "text_embeds": self.pooled}
            with self.accelerator.autocast():
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


@functools.cache
def prepare(device, quick):
    """Make the pictures, and a GPU's base model; returns the words of both settings and the steps of a turn."""
    folder = OUT / "sdxl"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("outputs", "latents", "texts"):
        shutil.rmtree(folder / name, ignore_errors=True)  # an earlier call's caches
    os.chdir(folder)  # the pipeline's own caches are in outputs/ of the working directory
    if device.type == "cuda" and not quick:
        write_base(device)
        return [*WHOLE, *pictures(Path("pictures"), 48, 1024)], 2
    torch.set_num_threads(1)
    return [*TINY, *pictures(Path("pictures"), 48, 64 if quick else 256)], 1 if quick else 4


def clock_of(device):
    """Return CPU seconds for a CPU, whose other processes then count little."""
    return time.process_time if device.type == "cpu" else None


def compare_step(device, quick):
    """Return our update against diffusers' script, of a LoRA on a GPU, of the whole U-Net on a CPU."""
    words, steps = prepare(device, quick)
    whole = [] if device.type == "cuda" else ["task.lora=null"]
    config = configure(*words, *CACHED, *whole)
    setup, streams = start(config)
    stream = streams.train.steps(0, BATCH, BATCH)
    batch = to_device(next(stream)[0], device)
    task = make_task(config, setup).to(device)
    theirs = DiffusersScript(config, task, batch, steps)
    ours = loop_turn(config, task, stream, steps)
    return Comparison({"atelier": ours, "diffusers fused": theirs}, steps, clock=clock_of(device))


def measure_start(device, quick):
    """Return the row of a start."""
    words, _ = prepare(device, quick)
    words = [*WORDS, *words, *CACHED, "loop.total_steps=1"]
    _, start_ms, stages = run_script("finetune_sdxl.py", Path("outputs/start"), words, Path.cwd())
    return [compare_with_goal("SDXL, start", start_ms, GOAL_START_MS, stages=stages)]


def settings(device, quick):
    """Yield the step and the start."""
    yield "SDXL, step", lambda: compare_step(device, quick)
    yield "SDXL, start", lambda: measure_start(device, quick)


if __name__ == "__main__":
    run_bench(settings, turns=3)
