"""What a run says on the screen at its start, after its first steps and at its end; log.txt has more."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engine.config import TrainingConfig
from engine.plan import Plan, shortest_tested
from engine.recorder import memory_by_part, show_memory
from engine.run_parts import Run
from engine.runtime import Runtime, choose_workers
from utils.record.figures import show_duration, show_evaluated

_MANY_HITS = 0.9  # of those that a cache of all images could have


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def start_screen(
    script: str,
    config: TrainingConfig,
    plan: Plan,
    runtime: Runtime,
    networks: Mapping[str, nn.Module],
    data: Mapping[str, str],
    folder: str,
) -> str:
    """Return the first screen. networks: what is trained; data: the lines of the collection and its images."""
    values = config.model_dump(mode="json")
    count = sum(parameter.numel() for network in networks.values() for parameter in network.parameters())
    source = "" if config.init_from is None else f", begins with {config.init_from}"
    length = (
        f"{plan.epochs:g} epochs of {plan.epoch_length / plan.global_batch_size:.4g} steps, {plan.total_steps:,} in all"
    )
    evaluated = f"evaluated every {plan.evaluate_every_epochs:.3g} epochs"
    rows = [
        *data.items(),
        ("training", f"{length}, of {plan.global_batch_size} images each; {evaluated}"),
        ("rate", _rate(config, plan)),
        ("machine", _machine(runtime, plan, searches=config.loop.batch_size == "auto")),
        ("run folder", folder),
    ]  # fmt: skip
    return (
        f"{script}.py: {values['task']['name']}, {values['model']['name']}, {count:,} parameters{source}\n{_rows(rows)}"
    )


def _rate(config: TrainingConfig, plan: Plan) -> str:
    """Return the peak learning rate and where it comes from."""
    optimizer = f", {config.optim.name}, schedule {config.schedule.name}"
    if config.lr_finder.enabled and plan.total_steps >= shortest_tested(config.lr_finder):
        return f"found by a range test before the first update{optimizer}"
    if config.optim.lr is not None:
        return f"{plan.lr:.3g} (optim.lr){optimizer}"
    return f"{plan.lr:.3g} (optim.base_lr={config.optim.base_lr:g} x {plan.global_batch_size} / 256){optimizer}"


def _machine(runtime: Runtime, plan: Plan, *, searches: bool) -> str:
    ranks = "" if plan.world_size == 1 else f"{plan.world_size} ranks, each "
    batches = (
        "" if plan.accum_steps == 1 else f", {plan.accum_steps} micro-batches of {plan.micro_batch_size} an update"
    )
    if searches:
        batches = ", micro-batches of what its memory takes"
    name = "CPU" if runtime.device.type == "cpu" else torch.cuda.get_device_name(runtime.device)
    return (
        f"{ranks}{name}, {runtime.precision}, {torch.get_num_threads()} threads, "
        f"{runtime.workers} loader workers{batches}"
    )


def end_screen(run: Run, seconds: float, next_commands: Sequence[str]) -> str:
    """Return the last screen of a complete run. next_commands: what to type next."""
    evaluator, plan, folder = run.evaluator, run.plan, run.saver.folder
    best, metric = evaluator.best, run.learner.task.best_metric
    rows: list[tuple[str, Any]] = []
    if best.step is not None:
        last = evaluator.last_report.get(f"ema/{metric}" if run.learner.exports_average else metric)
        rows = [
            (
                "best",
                f"{show_evaluated(metric)} {best.value:.4g} at epoch {plan.shown_epoch(best.step):g}; last {last:.4g}",
            ),
            ("weights", f"{folder.weights}/best_weights.safetensors, last_weights.safetensors"),
        ]
    rows.append(("memory", show_memory(memory_by_part(run.learner))))
    rows += [("curves", f"{folder.plots}/curves.png"), ("tables", f"{folder.path}/tables, training_log.txt")]
    rows += [("data", describe_data(run.recorder.wait_share, run.streams.train.readings()))]
    rows += [("next" if number == 0 else "", line) for number, line in enumerate(next_commands)]
    return f"finished: {run.step:,} steps in {show_duration(seconds)}\n{_rows(rows)}"


def describe_data(wait_share: float, readings: Mapping[str, float]) -> str:
    """Return the share of the time that was a wait, and the readings of the caches in a line."""
    shown = [
        f"{name} {value:.0%}" if name.endswith("_rate") else f"{name} {value:,.3g}" for name, value in readings.items()
    ]
    return ", ".join([f"{wait_share:.0%} of the time was a wait for it", *shown])


def advise(runtime: Runtime, epochs: float, readings: Mapping[str, float]) -> str:
    """Return the setting that helps a run that waits for data. epochs: that this process has trained."""
    workers = choose_workers("auto", runtime.device.type)
    if runtime.workers < workers:
        return f"runtime.workers is {runtime.workers}, and the cores of a rank allow {workers}"
    if epochs < 2:
        return (
            "images were read once, so no cache could help: prepare.py job=pack puts many small files into shards that "
            "are read in sequence, and augment.shrink=true decodes large photographs no larger than crops need"
        )
    missed = 1.0
    for name in ("l1_hit_rate", "l2_hit_rate"):
        missed *= 1 - readings.get(name, 0.0)
    if 1 - missed < _MANY_HITS * (1 - 1 / epochs):
        return (
            f"{missed:.0%} of the images were decoded again: raise data.cache.memory_gib, or keep them on a disk "
            "(data.cache.disk_gib)"
        )
    return "decoded images come from a cache, so augmentation takes the time: try augment.on_device=true"
