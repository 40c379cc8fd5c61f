"""The memory that parts of SDXL's training take, beside what `runtime.memory_gib` predicts: the rows of docs/sdxl.md.

python bench/memory.py [quick] [rows] [TEXT OF A SETTING]     (on a GPU; a minute a setting, after a minute for a base)

A setting is a command of docs/sdxl.md, with SDXL's own sizes and random weights (outputs/bench/sdxl/base, 7 GB). Each
part of a run gives a row: torch's own peak, without CUDA's libraries, over the prediction. `quick`: four settings of
tiny networks. Without a GPU, GiB are the bytes of the tensors that a part creates, whose figures mean nothing.
"""

import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import compare_with_goal, run_bench
from bench.sdxl import CACHED, configure, make_task, prepare, start
from data.stream.batch import to_device
from engine.plan import plan_streams
from engine.task import Report
from engine.update.learner import Learner
from engine.update.runtime import choose_runtime
from sdxl.memory import LIBRARIES_GIB, LiveBytes, predict_memory
from sdxl.settle import CHANGES

LORA = ["runtime.grad_checkpointing=true", "task.samples.prompts=[a cat]"]
UNET = [
    *LORA, "task.lora=null", "optim.bf16_weights=true", "optim.fused_backward=true", "loop.batch_size=1",
    "runtime.offload=true", "loop.clip_grad_norm=null",
]  # fmt: skip
SETTINGS = {
    "LoRA, 8 GB": [*LORA, "loop.micro_batch_size=1", "runtime.offload=true", "model.frozen_dtype=int8"],
    "LoRA, 12 GB": [*LORA, "loop.micro_batch_size=1", "runtime.offload=true"],
    "LoRA, 16 GB": [*LORA, "loop.micro_batch_size=4"],
    "whole U-Net, 24 GB": [*UNET, "optim=adamw"],
    "LoRA, 24 GB": [*LORA[1:], "loop.micro_batch_size=1"],
    "whole U-Net, 12 GB": [*UNET, "optim=adafactor"],
}
SMALL = ["runtime.precision=bf16", "task.samples.image_size_hw=[64,64]", "task.samples.steps=2"]


def settings(device, quick):
    """Yield a setting for each row of the table, with a function that returns its rows."""
    for name, words in [*SETTINGS.items()][: 4 if quick else None]:
        yield name, lambda name=name, words=words: compare(name, words, device, quick)


def measure_gib(call, device):
    """Return the GiB of torch's peak on a GPU, else of the tensors that the call creates."""
    if device.type != "cuda":
        with LiveBytes() as live:
            call()
        return live.peak / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def compare(name, words, device, quick):
    """Yield measured over predicted GiB of each part."""
    made, _ = prepare(device, quick)
    shutil.rmtree("latents", ignore_errors=True)  # of the setting before
    more = ["data.validation_fraction=0.3", *CACHED[:1], *words, *(SMALL if quick else [])]
    config = configure(*made, *more)
    for change in CHANGES[:-1]:
        config = change.apply(config, None)
    predicted = predict_memory(config, "bf16")
    runtime = choose_runtime(config.runtime)
    opened = []
    found = measure_gib(lambda: opened.extend(start(config)), device)
    yield compare_with_goal(f"{name}, encoding", found, predicted["encoding"] - LIBRARIES_GIB, "gib", "predicted")
    setup, streams = opened
    task = make_task(config, setup)
    plan = plan_streams(config, streams, 1)
    learner = Learner(task, config, plan, runtime)
    steps = streams.train.steps(0, plan.batch_size, plan.micro_batch_size)

    def update():
        for _ in range(2):
            learner.update([to_device(part, device) for part in next(steps)])

    @torch.no_grad()
    def evaluate():
        with runtime.autocast(), learner.evaluated(), mock.patch.object(task, "draw", return_value=Report()):
            task.evaluate(streams.evaluation, 1)

    @torch.no_grad()
    def draw():
        with runtime.autocast(), learner.evaluated():
            task.draw()

    for part, call in (("step", update), ("evaluation", evaluate), ("pictures", draw)):
        task.train(part == "step")
        found = measure_gib(call, device)
        yield compare_with_goal(f"{name}, {part}", found, predicted[part] - LIBRARIES_GIB, "gib", "predicted")


if __name__ == "__main__":
    run_bench(settings)
