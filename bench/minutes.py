"""Ours against timm's tuned script on equal time: `train.py loop.minutes=M` at its defaults, and timm's train.py.

    python bench/minutes.py [minutes=2] [collections=FOLDER] [names=glyphs,...] [seeds=3] [core=0] [journal=PATH]
        [timm_script=TIMM/train.py]

collections: what bench/draw_collections.py drew. timm_script: `train.py` of a checkout of
huggingface/pytorch-image-models that fits the installed timm and has --train-batches-per-epoch; without it, only ours
runs. For two cores, start two commands with names, cores and journals of their own.

Each run has one core (`taskset`) and one thread. Ours has its minutes from typing to the end of the process. timm has a
trial of each combination of SETTINGS, on each collection and for each time, with seed 0: SCREEN of the minutes for all,
then all minutes for the best FINALISTS. The best of these, by top-1 of the last weights on val, also runs with the
other seeds. Its minutes are those of training steps: starting, the first batch, evaluating and the search for the best
trial do not count, which favours it. The steps that fit are counted from the last three runs of the same network, size
and augmentation, at first from one of CALIBRATION_STEPS.

Another process on the core makes wall time lie. So steps are counted by CPU seconds, and a run is named whose wall and
CPU time differ by more than 10 %. The journal (outputs/bench/minutes.jsonl) has every run of a machine; a killed bench
that is typed again goes on, and a finished one only prints. After a change of ours, delete its lines.
"""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
from PIL import Image

from bench.gpu import read_words
from bench.measure import OUT
from utils.config.help import ROOT
from utils.hardware import has_fast_bf16
from utils.io.files import file_lock
from utils.io.journal import Journal
from utils.record.figures import show_rows
from utils.record.run_reader import RunReader

DEFAULTS = {
    "minutes": "2",
    "collections": str(OUT / "collections"),
    "names": "glyphs,fashion",
    "seeds": "3",
    "core": str(min(os.sched_getaffinity(0))),
    "journal": str(OUT / "minutes.jsonl"),
    "timm_script": "",
}
SETTINGS = {
    "rate": [1e-3, 3e-3],
    "network": ["resnet18", "resnet10t"],
    "augmentation": ["mild", "strong"],
    "size_px": [48, 64],
}
SCREEN = 0.25
FINALISTS = 4
CALIBRATION_STEPS = 20
BATCH = 64
# timm counts in whole epochs: a run is cut into EPOCHS "epochs" of a tenth of the steps, each a fresh random draw.
EPOCHS = 10
TIMM = shlex.split(
    f"--device cpu --workers 0 --batch-size {BATCH} --validation-batch-size 256 --opt adamw "
    "--opt-kwargs fused=True --weight-decay 0.05 --clip-grad 1.0 --smoothing 0.1 --sched-on-updates --warmup-epochs 1 "
    "--warmup-lr 1e-6 --crop-pct 1.0 --interpolation bilinear --train-interpolation bilinear --checkpoint-hist 1 "
    f"--log-interval 10 --epochs {EPOCHS} --val-interval {EPOCHS}"
)
AUGMENTATIONS = {
    "mild": ["--scale", 0.7, 1.0, "--color-jitter", 0],
    "strong": ["--scale", 0.35, 1.0, "--color-jitter", 0.2, "--reprob", 0.2],
}
NOT_MIRRORED = ["glyphs"]  # a user knows that a mirrored letter is another one
# `Train: 0 [  10/30 ( 37%)]  ...  Time: 0.191s,  334.74/s  (0.328s,  195.01/s)`: the mean rate of the epoch so far.
TIMM_LINE = re.compile(r"Train: (\d+) \[ *(\d+)/.*?Time: .*?\(.*?s, +([\d.]+)/s\)")
COLUMNS = [
    ("seed", "count"), ("top1", "mean"), ("top1", "min"), ("top1", "max"), ("steps", "mean"), ("wall_sec", "mean"),
    ("cpu_sec", "mean"),
]  # fmt: skip


def make_trial(arm, name, minutes, seed=0, settings=None):
    """Return one run; minutes: 0 for a calibration, which is not evaluated."""
    trial = {"arm": arm, "name": name, "minutes": minutes, "seed": seed, "settings": settings or {}}
    words = [arm, name, f"{minutes:g}min", f"seed{seed}", *trial["settings"].values()]
    return {"trial": "-".join(map(str, words)), **trial}


class Bench:
    """The runs that were asked for. The journal says which of them are left."""

    def __init__(self, given):
        self.given = given
        self.minutes = float(given["minutes"])
        self.seeds = int(given["seeds"])
        self.root = Path(given["collections"]).absolute()
        self.file = Path(given["journal"]).absolute()
        self.journal = Journal(self.file, "bench/minutes.py")

    def run(self):
        """Make all runs that the journal lacks, those of the first collections first."""
        arms = ["ours", "timm"] if self.given["timm_script"] else ["ours"]
        for name, arm in itertools.product(self.given["names"].split(","), arms):
            while left := self._next(name, arm):
                self._run(left[0])

    def _next(self, name, arm):
        """Return the runs that are left of an arm's first unfinished stage: screening, finalists, seeds."""
        if arm == "ours":
            return self._left([make_trial(arm, name, self.minutes, seed) for seed in range(self.seeds)])
        settings = [dict(zip(SETTINGS, values)) for values in itertools.product(*SETTINGS.values())]
        for minutes, kept in ((SCREEN * self.minutes, FINALISTS), (self.minutes, 1)):
            trials = [make_trial(arm, name, minutes, 0, each) for each in settings]
            if left := self._left(trials):
                return left
            rows = {row["trial"]: row for row in self.journal.parts()}
            trials.sort(key=lambda trial: -rows[trial["trial"]]["top1"])
            settings = [trial["settings"] for trial in trials[:kept]]
        return self._left([make_trial(arm, name, self.minutes, seed, settings[0]) for seed in range(1, self.seeds)])

    def _left(self, trials):
        known = {row["trial"] for row in self.journal.parts()}
        return [trial for trial in trials if trial["trial"] not in known]

    def _run(self, trial):
        """Run a trial and add its row to the journal; returns the row."""
        out = self.file.with_suffix("") / trial["trial"]
        steps = self._count_steps(trial) if trial["arm"] == "timm" else None
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = self._our_command(trial, out) if steps is None else self._timm_command(trial, out, steps)
        wall_sec, cpu_sec = run_on(self.given["core"], command, out / "output.log")
        found = read_ours(out / "run") if steps is None else read_timm(out)
        row = {**trial, **found, "wall_sec": round(wall_sec, 1), "cpu_sec": round(cpu_sec, 1)}
        self.journal.add(row)
        busy = "" if 0.9 < cpu_sec / wall_sec < 1.1 else "; WALL AND CPU TIME DIFFER: is the core busy?"
        found = f"top-1 {row['top1']:.4f}, {row['steps']} steps, {wall_sec:.1f} s{busy}"
        sys.stderr.write(f"{trial['trial']}: {found}\n")
        shutil.rmtree(out / "run", ignore_errors=True)  # weights
        return row

    def _count_steps(self, trial):
        """Return how many steps of timm's fit into the minutes, in multiples of EPOCHS."""
        if not trial["minutes"]:
            return CALIBRATION_STEPS
        kind = {**trial["settings"], "arm": "timm", "name": trial["name"]}
        kind.pop("rate")
        rows = [{**row["settings"], **row} for row in self.journal.parts()]
        rows = [row for row in rows if kind.items() <= row.items()][-3:]
        if not rows:
            rows = [self._run(make_trial("timm", trial["name"], 0, 0, trial["settings"]))]
        step_sec = [row["train_sec"] * min(1.0, row["cpu_sec"] / row["wall_sec"]) / row["steps"] for row in rows]
        epochs = round(60 * trial["minutes"] / statistics.median(step_sec) / EPOCHS)
        return EPOCHS * max(1, epochs)

    def _our_command(self, trial, out):
        data = f"data.root={self.root / trial['name']}"
        return [
            sys.executable, "train.py", data, f"run_dir={out / 'run'}", f"seed={trial['seed']}",
            f"loop.minutes={trial['minutes']:g}",
        ]  # fmt: skip

    def _timm_command(self, trial, out, steps):
        root = self.root / trial["name"]
        settings = trial["settings"]
        with Image.open(next((root / "train").glob("*/*.png"))) as image:
            channels = 1 if image.mode == "L" else 3
        recipe = {
            "--model": settings["network"],
            "--lr": settings["rate"],
            "--img-size": settings["size_px"],
            "--train-img-sizes": settings["size_px"],
            "--hflip": 0.0 if trial["name"] in NOT_MIRRORED else 0.5,
        }
        data = {"--data-dir": root, "--num-classes": len(list((root / "train").iterdir())), "--in-chans": channels}
        values = {
            **recipe,
            **data,
            "--seed": trial["seed"],
            "--train-batches-per-epoch": steps // EPOCHS,
            "--val-split": "val" if trial["minutes"] else "",
            "--output": out,
            "--experiment": "run",
        }
        half = [0.5] * channels
        words = [*TIMM, *AUGMENTATIONS[settings["augmentation"]], "--mean", *half, "--std", *half]
        if has_fast_bf16("cpu"):
            words += ["--amp", "--amp-dtype", "bfloat16", "--channels-last"]
        for name, value in values.items():
            words += [name, value]
        return [sys.executable, Path(self.given["timm_script"]).absolute(), *words]


def run_on(core, command, log):
    """Run a command with one thread on one core, its output in `log`; returns its seconds of wall and of CPU.

    It ends with the process that called. Raises RuntimeError if it fails.
    """
    words = list(map(str, ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", core, *command]))
    started = time.monotonic()
    with open(log, "w") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, cwd=ROOT, stdout=stream, stderr=stream, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"status {process.returncode}, {log}:\n{log.read_text(errors='replace')[-2000:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime


def read_ours(run):
    """Return top-1 of the evaluation after the last step, and that step."""
    row = [row for row in RunReader(run).rows if row["kind"] == "evaluate"][-1]
    return {"top1": row["top1"], "steps": row["step"]}


def read_timm(out):
    """Return top-1 after the last step, the steps, and their seconds; the first, which reads, counts as the others."""
    lines = TIMM_LINE.findall((out / "output.log").read_text(errors="replace"))
    last = {epoch: (int(update) + 1, float(rate)) for epoch, update, rate in lines}
    steps = sum(updates for updates, _ in last.values())
    seconds = sum(updates * BATCH / rate for updates, rate in last.values())
    first_sec = BATCH / float(lines[0][2])
    with open(out / "run/summary.csv", newline="") as stream:
        top1 = float(list(csv.DictReader(stream))[-1].get("eval_top1", 0)) / 100
    return {"top1": top1, "steps": steps, "train_sec": (seconds - first_sec) * steps / (steps - 1)}


def table(rows):
    """Return rows of the journal as a table: a line for each arm and its settings, the best of a collection first.

    The best settings of timm have several seeds.
    """
    rows = [{**row, "settings": " ".join(map(str, row["settings"].values()))} for row in rows if row["minutes"]]
    groups = pa.Table.from_pylist(rows).group_by(["name", "minutes", "arm", "settings"]).aggregate(COLUMNS)
    order = [("name", "ascending"), ("minutes", "descending"), ("top1_mean", "descending")]
    return show_rows(groups.sort_by(order).to_pylist())


def main():
    given = read_words(DEFAULTS, sys.argv[1:])
    journal = Path(given["journal"])
    with file_lock(journal, f"minutes: another bench writes {journal}"):
        Bench(given).run()
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    sys.stdout.write(f"{table(rows)}\n{journal}\n")


if __name__ == "__main__":
    main()
