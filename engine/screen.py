"""What a run says on the screen at its start and at its end; log.txt has more."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from engine.config import TrainingConfig
from engine.plan import Plan
from engine.runtime import Runtime


def show_lines(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title and named lines below it."""
    return "\n".join([title, *(f"  {name:<11} {text}" for name, text in rows)])


def start_screen(
    config: TrainingConfig, plan: Plan, runtime: Runtime, networks: Mapping[str, nn.Module], data: Mapping[str, str]
) -> str:
    """Return the first screen. networks: what is trained; data: the lines of the collection and its images."""
    count = sum(parameter.numel() for network in networks.values() for parameter in network.parameters())
    source = "" if config.init_from is None else f", begins with {config.init_from}"
    steps = f"{plan.epoch_length / plan.global_batch_size:.4g} steps, {plan.total_steps:,} in all"
    length = f"{plan.shown_epoch(plan.total_steps):g} epochs of {steps}, of {plan.global_batch_size} images each"
    rate = f"{plan.lr:.3g} (optim.base_lr={config.optim.base_lr:g} x {plan.global_batch_size} / 256)"
    if plan.range_test_steps:
        rate = "found by a range test before the first update"
    elif config.optim.lr is not None:
        rate = f"{plan.lr:.3g} (optim.lr)"
    ranks = "" if plan.world_size == 1 else f"{plan.world_size} ranks, each "
    device = "CPU" if runtime.device.type == "cpu" else torch.cuda.get_device_name(runtime.device)
    batches = ""
    if config.loop.batch_size == "auto":
        batches = ", micro-batches of what its memory takes"
    elif plan.accum_steps > 1:
        batches = f", {plan.accum_steps} micro-batches of {plan.micro_batch_size} an update"
    machine = f"{runtime.precision}, {torch.get_num_threads()} threads, {runtime.workers} loader workers{batches}"
    return show_lines(
        f"{config.task.name}, {config.model.name}, {count:,} parameters{source}",
        [
            *data.items(),
            ("training", f"{length}; evaluated every {plan.evaluate_every_epochs:.3g} epochs"),
            ("rate", f"{rate}, {config.optim.name}, schedule {config.schedule.name}"),
            ("machine", f"{ranks}{device}, {machine}"),
        ],
    )
