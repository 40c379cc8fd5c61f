"""What saving costs: a run with one save in 100 steps against the same run without: in the background, in line, timm's.

python bench/save_cost.py [quick]            (on an idle machine)

Sides run in turns, each turn 25 steps of the loop itself (engine/train_one_epoch.py) that begin with a save or not:
AdamW, EMA, accumulation 1. A turn ends when its write has ended, so what the writing thread takes of the machine's
cores while steps run is within the figure, and what it still writes after them counts in full. The ratio is that of 100
steps with one save: 1 + (with - without) / (100 steps without). Whole turns of 100 steps would measure the same, with
four times the noise.

timm's side is our loop with its CheckpointSaver in our writer's place, as its train.py saves within an epoch
(`--recovery-interval`): weights, average and optimiser, pickled in line, not flushed to the disk.
"""

import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.utils import CheckpointSaver, ModelEmaV3

from bench.finetune_step import make_batch, make_task
from bench.measure import bench_loop, build_bench_run, describe_machine, row_of, take_turns, write
from engine.train_one_epoch import StopVote, train_one_epoch
from engine.writer import CheckpointWriter
from utils.config.entry_point import Job
from utils.record.run_folder import RunFolder

NETWORKS = {"convnextv2_atto": 64, "resnet18": 64}
BATCH = {"cpu": 16, "cuda": 128}
STEPS, TURNS, SAVE_EVERY = 25, 11, 100
SIDES = ("none", "background", "in line", "timm")


def make_side(name, size, kind, steps, folder, device):
    """Return a turn of a side: a save where it has one, then `steps` steps; and what ends its write."""
    run = build_bench_run(
        make_task(name, size),
        batch_size=BATCH[device.type],
        epoch_steps=steps,
        runtime={"device": device.type, "deterministic": False},
        loop={"ema_decay": 0.9998},
    )
    path = folder / f"{name}-{kind}".replace(" ", "_")
    for inner in ("checkpoints", "weights"):
        (path / inner).mkdir(parents=True)
    run.saver.folder = RunFolder(path, {"task": {}, "model": {}}, Job("bench", {}, []))
    run.saver.writer = CheckpointWriter(in_background=kind == "background", retries=False)
    run.recorder.folder = path
    run.recorder.open(0, str)
    batch = make_batch(size, BATCH[device.type], device)
    stream, epochs, vote = itertools.repeat([batch]), itertools.count(), StopVote()
    if kind == "timm":
        network, recovery = run.learner.task.network, str(path / "checkpoints")
        optimizer = run.learner.optimizer
        saver = CheckpointSaver(network, optimizer, model_ema=ModelEmaV3(network), recovery_dir=recovery)

    def turn():
        if kind == "timm":
            saver.save_recovery(0, run.step)
        elif kind != "none":
            run.save(last=False)
        train_one_epoch(run, stream, bench_loop(), next(epochs), vote)
        run.saver.writer.finish()

    return run, turn


def measure(name, size, *, quick):
    """Return rows of a network: each way to save against none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, turns = (4, 2) if quick else (STEPS, TURNS)
    with tempfile.TemporaryDirectory(prefix="save_cost_") as folder:
        sides = {kind: make_side(name, size, kind, steps, Path(folder), device) for kind in SIDES}
        turn_of = {kind: turn for kind, (_, turn) in sides.items()}
        # The first turn is the warm-up: buffers are made, kernels loaded.
        found = take_turns(turn_of, steps=steps, warmup=1, turns=turns, device=device)
        groups, _ = sides["none"][0].learner.state()
        size_mib = sum(tensor.nbytes for group in groups.values() for tensor in group.values()) / 2**20
    # Milliseconds per step of SAVE_EVERY steps of which one saves: the turn's own cost, spread over them.
    share = steps / SAVE_EVERY
    spread = {
        kind: [none + share * (value - none) for value, none in zip(values, found["none"])]
        for kind, values in found.items()
    }
    setting = f"{name}, {size} px, {size_mib:.0f} MiB, a save per {SAVE_EVERY} steps"
    return [{**row_of(setting, spread, kind, "none"), "state_mib": round(size_mib, 1)} for kind in SIDES[1:]]


def main():
    quick = sys.argv[1:] == ["quick"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = list(NETWORKS.items())[: 1 if quick else None]
    rows = [row for name, size in networks for row in measure(name, size, quick=quick)]
    write("save_cost", rows, machine=describe_machine(device), quick=quick)


if __name__ == "__main__":
    main()
