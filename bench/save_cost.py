"""What saving costs: a run with one save in 100 steps against the same run without, the saves in the background or not.

python bench/save_cost.py [quick]            (on an idle machine)

Sides run in turns, each turn 100 steps of the loop itself (engine/train_one_epoch.py), with a save at the end of the
turn or not: AdamW, EMA, accumulation 1. A turn in the background ends while its write may still be under way, so the
next turn, one of another side, would pay for it: its end is waited for outside the measured time, and what remained is
reported as `left_ms` (none, where a write takes less than the steps that follow it). What the writing thread takes of
the machine's cores while steps run is within the figure: the measured turn begins right after a save was submitted.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.finetune_step import make_batch, make_task
from bench.measure import build_training, describe_machine, row_of, time_ms, write
from engine.checkpoint import count_bytes
from engine.skips import SkipWatch
from engine.train_one_epoch import StopVote, train_one_epoch
from engine.writer import CheckpointWriter
from utils.config import Job
from utils.metrics_log import MetricsLog
from utils.run_folder import RunFolder

NETWORKS = {"convnextv2_atto": 64, "resnet18": 64}
BATCH = {"cpu": 16, "cuda": 128}
STEPS, TURNS = 100, 5
SIDES = ("none", "background", "in line")


def make_side(name, size, kind, steps, folder, device):
    """Return a turn of a side: a save where it has one, then `steps` steps; and what ends its write."""
    training = build_training(
        make_task(name, size),
        runtime="reference",
        batch_size=BATCH[device.type],
        epoch_steps=steps,
        runtime_changes={"device": device.type, "deterministic": False},
        ema_decay=0.9998,
    )
    path = folder / f"{name}-{kind}".replace(" ", "_")
    for inner in ("checkpoints", "weights"):
        (path / inner).mkdir(parents=True)
    training.folder = RunFolder(path, {"task": {}, "model": {}}, Job("bench", {}, []))
    training.metrics = MetricsLog(path, 0)
    training.writer = CheckpointWriter(in_background=kind == "background", retries=False)
    training.skips = SkipWatch(None, rolls_back=False)
    batch = make_batch(size, BATCH[device.type], device)
    stream, epochs, vote = itertools.repeat([batch]), itertools.count(), StopVote()

    def turn():
        if kind != "none":
            training.save(last=False)
        train_one_epoch(training, stream, next(epochs), vote)

    return training, turn


def measure(name, size, *, quick):
    """Return rows of a network: each way to save against none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, turns = (4, 2) if quick else (STEPS, TURNS)
    found, left = {kind: [] for kind in SIDES}, []
    with tempfile.TemporaryDirectory(prefix="save_cost_") as folder:
        sides = {kind: make_side(name, size, kind, steps, Path(folder), device) for kind in SIDES}
        for number in range(turns + 1):  # the first is the warm-up: buffers are made, kernels loaded
            for kind, (training, turn) in sides.items():
                taken = time_ms(turn, device) / steps
                begun = time.perf_counter()
                training.writer.finish()
                if number > 0:
                    found[kind].append(taken)
                    left += [1e3 * (time.perf_counter() - begun)] if kind == "background" else []
        size_mib = count_bytes(sides["none"][0]._groups()[0]) / 2**20
    rows = [
        {
            **row_of(f"{name}, {size} px, {size_mib:.0f} MiB, a save per {steps} steps", found, kind, "none"),
            "state_mib": round(size_mib, 1),
        }
        for kind in ("background", "in line")
    ]
    rows[0]["left_ms"] = round(statistics.median(left), 1)
    return rows


def main():
    quick = sys.argv[1:] == ["quick"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for name, size in NETWORKS.items() for row in measure(name, size, quick=quick)]
    write("save_cost", rows, machine=describe_machine(device), quick=quick)


if __name__ == "__main__":
    main()
