"""Measure how much of a minute is training: `train.py loop.minutes=1`, as a user types it.

python bench/minute.py [quick] [rows]        (a minute and a half of a GPU, on glyphs)

Rows are milliseconds over a goal. start: from typing to the first update, at most 8 s. other: all that is not training,
at most 15 s. updates: the training, at most as long as its updates take alone, on one batch on the device, over 0.9.
`quick`: two updates of a few images of noise, whose figures mean nothing.
"""

import re
import shutil
import subprocess
import sys
import time
from contextlib import chdir, closing
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

import train
from bench.measure import OUT, compare_with_goal, repeated, run_bench, time_ms
from engine.run.loop import Run
from utils.config.entry_point import validate
from utils.config.help import ROOT
from utils.record.run_reader import RunReader

FEW = OUT / "collections/few"
QUICK = [f"data.root={FEW}", "loop.total_steps=2", "loop.batch_size=8", "augment.image_size_hw=[32,32]"]
GOAL_SHARE = 0.9  # of the updates that a second has without a loop
UPDATES = 20
STAGE = re.compile(r" ([\d.]+) s\b")


def draw_few():
    """Draw images of noise of two classes."""
    for number in range(16):
        folder = FEW / ("train" if number < 12 else "val") / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 64).save(folder / f"{number}.png")


def run_script(script, run, words, folder):
    """Run a script of training; returns its milliseconds, those to the first update, and its log's line of these."""
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / script), *words, f"run_dir={run}"], cwd=folder, check=True)
    whole_ms = 1e3 * (time.monotonic() - started)
    stages = re.search(r"start: .*", (run / "log.txt").read_text())[0]
    return whole_ms, 1e3 * sum(map(float, STAGE.findall(stages))), stages


def time_updates(words, run_dir):
    """Return the milliseconds that the updates of a finished run take alone."""
    found = []

    def time_alone(run, commands):
        with closing(run.read(0, 0)) as batches:
            update = partial(run.learner.update, next(batches))
        turn = repeated(update, UPDATES)
        turn()  # records the update
        found.append(time_ms(turn, run.learner.runtime.device) / UPDATES * run.step)

    values, job = train.main.compose([*words, f"run_dir={run_dir}"])
    with chdir(ROOT), mock.patch.object(Run, "fit", time_alone):
        train.main.load()(validate(values, train.main.schema), job)
    return found[0]


def measure(quick):
    """Yield the rows of one run."""
    run = OUT / "minute"
    words = ["loop.minutes=1"]
    if quick:
        draw_few()
        words = QUICK
    whole_ms, start_ms, stages = run_script("train.py", run, words, ROOT)
    last = {row["kind"]: row for row in RunReader(run).rows}
    trained = last["train"]
    trained_ms = 1e3 * trained["seconds"]
    facts = {"stages": stages, "steps": trained["step"], "top1": last["evaluate"]["top1"]}
    yield compare_with_goal("glyphs, start", start_ms, 8e3, **facts)
    yield compare_with_goal("glyphs, other", whole_ms - trained_ms, 15e3, **facts)
    alone_ms = time_updates(words, run)
    yield compare_with_goal("glyphs, updates", trained_ms, alone_ms / GOAL_SHARE, **facts)


def settings(device, quick):
    """Yield the setting."""
    yield "glyphs", lambda: measure(quick)


if __name__ == "__main__":
    run_bench(settings)
