"""A run killed fifty times at random moments against the uninterrupted run: do they end with the same bits?

    python bench/kill_trials.py [kills=50] [ranks=1] [seed=0] [script=finetune.py] [out=FOLDER] [KEY=VALUE ...]

Each start of the run gets SIGKILL, all ranks and their loader's workers at once, at a moment drawn by the clock; every
third one is aimed at a save: it comes at a random moment after a checkpoint's temporary folder has appeared. A kill
counts as inside a save where that folder is left behind. At the end every tensor of the last checkpoint, the rows of
metrics.jsonl and the samples of every step are compared with the uninterrupted run's. With accumulation, EMA, drop path
and loader workers; other keys (`runtime.parallel=fsdp`) go to both runs. The result
is added to outputs/bench/kill_trials.jsonl.
"""

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import OUT
from tests.support import checkpoint_tensors, common, make_collection, rows, run, samples_by_step, start

STEPS_PER_KILL = 8  # on average between two kills, so that the run does not end before the last
STEP_SEC = 0.025  # about what a step takes on a free core; on a busy one the kills come closer together
SETTINGS = [  # one rank accumulates over four micro-batches, two ranks over two
    "loop.batch_size=8", "loop.micro_batch_size=2", "loop.ema_decay=0.95", "loop.checkpoint_every_steps=3",
    "loop.evaluate_every_epochs=2", "loop.clip_grad_norm=1.0", "runtime.workers=2", "model.drop_path_rate=0.2",
    "schedule.warmup_steps=5",
]  # fmt: skip


DEFAULTS = {"kills": "50", "ranks": "1", "seed": "0", "script": "finetune.py", "out": ""}


def last_step(folder):
    """Return the last step that a run has a row of."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def half_written(folder):
    """Return the temporary folders of checkpoints."""
    return list((folder / "checkpoints").glob(".step_*.tmp-*"))


def wait_while_alive(started, condition, seconds):
    """Wait for a condition, the end of the run, or the time to be up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition() and any(process.is_alive() for process in started.processes):
        time.sleep(0.002)


def kill_once(started, folder, draw, seconds, aimed):
    """Kill a run at a random moment; returns whether that was inside a save, None where it had ended before."""
    begun = last_step(folder)
    wait_while_alive(started, lambda: last_step(folder) > begun, 120)
    left = set(half_written(folder))  # of an earlier kill
    wait_while_alive(started, lambda: False, draw.uniform(0, seconds))
    if aimed:
        wait_while_alive(started, lambda: set(half_written(folder)) - left, 60)
        time.sleep(draw.uniform(0, 0.01))
    started.signal(signal.SIGKILL)
    codes = started.wait()
    if codes == [0] * len(codes):
        return None
    assert codes == [-signal.SIGKILL] * len(codes), f"ended with {codes}:\n{started.output[-4000:]}"
    return bool(set(half_written(folder)) - left)


def compare(straight, killed, steps):
    """Return what differs between two runs that ended: nothing, where all went well."""
    one = checkpoint_tensors(straight, steps)
    other = checkpoint_tensors(killed, steps)
    different = [*(one.keys() ^ other.keys())]
    different += [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]
    for name in ("train", "evaluate", "epoch"):
        if rows(straight / "metrics.jsonl", name) != rows(killed / "metrics.jsonl", name):
            different.append(f"metrics.jsonl: {name}")
    if samples_by_step(straight) != samples_by_step(killed):
        different.append("samples")
    return different


def main():
    pairs = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    values = DEFAULTS | {key: value for key, value in pairs if key in DEFAULTS}
    overrides = [argument for argument in sys.argv[1:] if argument.partition("=")[0] not in DEFAULTS]
    script = values["script"]
    kills = int(values["kills"])
    ranks = int(values["ranks"])
    draw = random.Random(int(values["seed"]))
    steps = STEPS_PER_KILL * kills
    folder = Path(values["out"] or tempfile.mkdtemp(prefix="kill_trials_"))
    folder.mkdir(parents=True, exist_ok=True)
    data = make_collection(folder / "images")
    task = "fcmae" if script.startswith("pretrain") else "classification"
    settings = [*SETTINGS, f"loop.total_steps={steps}", *overrides]
    straight = folder / "uninterrupted"
    killed = folder / "killed"

    began = time.monotonic()
    run(script, common(task, data, straight, *settings), folder, ranks=ranks)
    command = common(task, data, killed, *settings)
    found = []  # of each kill: whether it was inside a save
    while len(found) < kills:
        # Twice the mean remaining time, since a moment is drawn from 0 on, but short enough that the run does not end.
        remaining = max(0, steps - last_step(killed) - STEPS_PER_KILL)
        seconds = min(2 * remaining / (kills - len(found)), remaining / 2) * STEP_SEC
        is_aimed = len(found) % 3 == 2
        inside = kill_once(start(script, command, folder, ranks), killed, draw, seconds, is_aimed)
        if inside is None:
            break
        found.append(inside)
    run(script, command, folder, ranks=ranks)
    different = compare(straight, killed, steps)
    row = {"script": script, "ranks": ranks, "overrides": overrides, "steps": steps, "kills": len(found)}
    row |= {"inside_a_save": sum(found), "aimed_at_a_save": len(found) // 3}
    row |= {"equal_bit_for_bit": not different, "different": different[:10]}
    row["minutes"] = round((time.monotonic() - began) / 60, 1)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "kill_trials.jsonl", "a") as stream:
        stream.write(json.dumps(row) + "\n")
    sys.stdout.write(json.dumps(row, indent=2) + "\n")
    sys.exit(0 if not different and len(found) == kills else 1)


if __name__ == "__main__":
    main()
