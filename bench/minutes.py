"""Ours against tuned rivals on equal time: `train.py loop.minutes=M` at its defaults, timm's script, fastai.

    python bench/minutes.py [minutes=2] [collections=FOLDER] [names=glyphs,...] [arms=ours,timm,fastai] [seeds=3]
        [timm_script=TIMM/train.py] [fastai_python=PYTHON] [cores=0,1] [screen=MINUTES] [journal=PATH] [table] [quick]

collections: what bench/four_collections.py drew: NAME and NAME_tenth. timm_script: `train.py` of a checkout of
huggingface/pytorch-image-models that fits the installed timm and has --train-batches-per-epoch. fastai_python: an
interpreter with fastai and this torch: `python -m venv F`, the path of this site-packages in a file
F/lib/python3.*/site-packages/x.pth, `F/bin/python -m pip install fastai`. An arm that lacks its word is left out.

Each run has one core (`taskset`) and one thread; each of `cores` takes one run at a time. Ours has its minutes from
typing to the end of the process. A rival has 12 trials per collection and time (RATES, SETTINGS) with seed 0; its best,
by top-1 on the validation images, runs with the other seeds, too. It has its minutes for training steps: starting, the
first batch and evaluating do not count, nor does the search for the best trial; all this favours the rivals. The steps
that fit are counted from the newest run of the same size on the same core, at first from one of CALIBRATION_STEPS.
screen: the 12 trials run for so many minutes, and only the best FINALISTS for the whole time.

top-1 is of the last weights, on all images of val. Another process on a core makes wall time lie, so steps are counted
by CPU seconds, and a run is told whose wall and CPU time differ by more than 10 %. The journal
(outputs/bench/minutes.jsonl) has every run; a killed bench that is typed again goes on. `table` only prints. quick: a
few steps on tiny collections; its figures mean nothing.
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
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from bench.measure import OUT, describe_machine
from utils.config.help import ROOT
from utils.io.files import file_lock
from utils.io.journal import Journal
from utils.record.figures import align_columns
from utils.record.run_reader import RunReader

RATES = {"timm": [1e-3, 3e-3], "fastai": [3e-3, 1e-2]}  # the highest of a run
SETTINGS = {"augmentation": ["mild", "strong"], "size_px": [32, 48, 64]}
SCALE = {"mild": 0.7, "strong": 0.35}  # the least area of a crop; `strong` adds what the rival's users add
NOT_MIRRORED = ["glyphs", "glyphs_tenth"]  # a user knows that a mirrored letter is another one
FINALISTS, CALIBRATION_STEPS, BATCH = 4, 40, 64
# timm counts in whole epochs: a run is cut into EPOCHS "epochs" of a tenth of the steps, each a fresh random draw.
EPOCHS = 10
TIMM = shlex.split(
    f"--model resnet18 --device cpu --workers 0 --batch-size {BATCH} --validation-batch-size 256 --opt adamw "
    "--opt-kwargs fused=True --weight-decay 0.05 --clip-grad 1.0 --smoothing 0.1 --sched-on-updates --warmup-epochs 1 "
    "--warmup-lr 1e-6 --crop-pct 1.0 --interpolation bilinear --train-interpolation bilinear --checkpoint-hist 1 "
    f"--log-interval 10 --epochs {EPOCHS} --val-interval {EPOCHS}"
)
TIMM_STRONG = shlex.split("--color-jitter 0.2 --reprob 0.2")
# `Train: 0 [  10/30 ( 37%)]  ...  Time: 0.191s,  334.74/s  (0.328s,  195.01/s)`: the mean rate of the epoch so far.
TIMM_LINE = re.compile(r"Train: (\d+) \[ *(\d+)/.*?Time: .*?\(.*?s, +([\d.]+)/s\)")
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
QUICK_WORDS = ["loop.total_steps=4", "loop.global_batch_size=8", "augment.image_size_hw=[32,32]"]
NEEDS = {"ours": None, "timm": "timm_script", "fastai": "fastai_python"}


def make_trial(arm, name, minutes, seed=0, settings=None):
    """Return one run; minutes: 0 for a calibration, which is not evaluated."""
    trial = {"arm": arm, "name": name, "minutes": minutes, "seed": seed, "settings": settings or {}}
    words = [arm, name, f"{minutes:g}min", f"seed{seed}", *trial["settings"].values()]
    return {"trial": "-".join(map(str, words)), **trial}


class Bench:
    """The runs that were asked for. The journal says which are next; a thread of each core takes them in turn."""

    def __init__(self, given, is_quick):
        self.given, self.is_quick = given, is_quick
        self.names, self.arms = given["names"].split(","), given["arms"].split(",")
        self.minutes, self.seeds = float(given["minutes"]), int(given["seeds"])
        self.root, self.file = Path(given["collections"]).absolute(), Path(given["journal"]).absolute()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        self.journal = Journal(self.file, "bench/minutes.py")
        self.running, self.failed, self.changed = set(), set(), threading.Condition()

    def run(self):
        """Make all runs that the journal lacks; returns the names of those that failed."""
        threads = [threading.Thread(target=self._work, args=[core]) for core in self.given["cores"].split(",")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.failed

    def _work(self, core):
        """Take the next run until there is none."""
        while True:
            with self.changed:
                while not (todo := self._todo()) and self.running:
                    self.changed.wait()
                if not todo:
                    return
                self.running.add(todo[0]["trial"])
            try:
                self._run(todo[0], core)
            except Exception as error:  # the other runs go on
                sys.stderr.write(f"{todo[0]['trial']}: {error}\n")
                self.failed.add(todo[0]["trial"])
            with self.changed:
                self.running.discard(todo[0]["trial"])
                self.changed.notify_all()

    def _todo(self):
        rows = {row["trial"]: row for row in self.journal.parts()}
        trials = [trial for pair in itertools.product(self.names, self.arms) for trial in self._next(*pair, rows)]
        return [trial for trial in trials if trial["trial"] not in {*rows, *self.running, *self.failed}]

    def _next(self, name, arm, rows):
        """Return the runs of an arm's first unfinished stage: screening, trials, seeds."""
        if arm == "ours":
            return [make_trial(arm, name, self.minutes, seed) for seed in range(self.seeds)]
        grid = itertools.product(RATES[arm], *SETTINGS.values())
        settings = [dict(zip(["rate", *SETTINGS], values)) for values in grid][: 2 if self.is_quick else None]
        for minutes in [*([float(self.given["screen"])] if self.given["screen"] else []), self.minutes]:
            trials = [make_trial(arm, name, minutes, 0, each) for each in settings]
            if any(trial["trial"] not in rows for trial in trials):
                return trials
            trials.sort(key=lambda trial: -rows[trial["trial"]]["top1"])
            settings = [trial["settings"] for trial in trials[:FINALISTS]]
        return [make_trial(arm, name, self.minutes, seed, settings[0]) for seed in range(1, self.seeds)]

    def _run(self, trial, core):
        """Run a trial on a core and add its row to the journal; returns the row."""
        out, arm = self.file.with_suffix("") / trial["trial"], trial["arm"]
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = {"ours": self._ours, "timm": self._timm, "fastai": self._fastai}[arm](trial, core, out)
        wall_sec, cpu_sec = run_on(core, command, out / "output.log")
        found = {"ours": read_ours, "timm": read_timm, "fastai": read_fastai}[arm](out)
        row = {
            **trial,
            **found,
            "wall_sec": round(wall_sec, 1),
            "cpu_sec": round(cpu_sec, 1),
            "core": core,
            "bf16": BF16,
        }
        if arm != "ours":
            row["step_sec"] = row["train_sec"] * min(1.0, cpu_sec / wall_sec) / row["steps"]
        with self.changed:
            self.journal.add({**row, "machine": describe_machine(torch.device("cpu"))})
        busy = "" if 0.9 < cpu_sec / wall_sec < 1.1 else "; WALL AND CPU TIME DIFFER: is the core busy?"
        sys.stderr.write(
            f"{time.strftime('%H:%M:%S')} core {core}, {trial['trial']}: top-1 {row['top1']:.4f}, {row['steps']} steps"
            f", {wall_sec:.1f} s, CPU {cpu_sec:.1f} s{busy}\n"
        )
        shutil.rmtree(out / "run", ignore_errors=True)  # weights
        return row

    def _steps(self, trial, core):
        """Return how many steps of a rival fit into its minutes, in multiples of EPOCHS."""
        if self.is_quick or not trial["minutes"]:
            return EPOCHS if self.is_quick else CALIBRATION_STEPS
        kind = [trial["arm"], trial["name"], trial["settings"]["size_px"], core]
        with self.changed:
            rows = list(self.journal.parts())
        rows = [row for row in rows if [row["arm"], row["name"], row["settings"].get("size_px"), row["core"]] == kind]
        row = rows[-1] if rows else self._run(make_trial(*kind[:2], 0, 0, trial["settings"]), core)
        return max(EPOCHS, round(60 * trial["minutes"] / row["step_sec"] / EPOCHS) * EPOCHS)

    # ----------------------------------------------------------------------------------------- commands of the arms

    def _ours(self, trial, core, out):
        words = QUICK_WORDS if self.is_quick else [f"loop.minutes={trial['minutes']:g}"]
        words += [f"seed={trial['seed']}"] if trial["seed"] else []
        return [sys.executable, "train.py", f"data.root={self.root / trial['name']}", f"run_dir={out / 'run'}", *words]

    def _facts(self, trial):
        """Return what both rivals are told of a collection, beside the settings."""
        train = self.root / trial["name"] / "train"
        with Image.open(next(train.glob("*/*"))) as image:
            channels = 1 if image.mode == "L" else 3
        return channels, len(list(train.iterdir())), trial["name"] not in NOT_MIRRORED

    def _timm(self, trial, core, out):
        channels, classes, flips = self._facts(trial)
        settings, steps = trial["settings"], self._steps(trial, core)
        is_strong, size_px = settings["augmentation"] == "strong", settings["size_px"]
        return [
            sys.executable, Path(self.given["timm_script"]).absolute(), *TIMM, "--data-dir", self.root / trial["name"],
            "--num-classes", classes, "--in-chans", channels, "--mean", *[0.5] * channels, "--std", *[0.5] * channels,
            "--img-size", size_px, "--train-img-sizes", size_px, "--lr", settings["rate"], "--seed", trial["seed"],
            "--scale", SCALE[settings["augmentation"]], 1.0, "--hflip", 0.5 if flips else 0.0,
            *(TIMM_STRONG if is_strong else ["--color-jitter", 0.0]),
            *(["--amp", "--amp-dtype", "bfloat16"] if BF16 else []), "--train-batches-per-epoch", steps // EPOCHS,
            "--val-split", "val" if trial["minutes"] else "", "--output", out, "--experiment", "run",
        ]  # fmt: skip

    def _fastai(self, trial, core, out):
        channels, classes, flips = self._facts(trial)
        facts = {"root": str(self.root / trial["name"]), "seed": trial["seed"], "channels": channels, "flips": flips}
        facts |= {"steps": self._steps(trial, core), "batch": BATCH, "bf16": BF16, "evaluate": trial["minutes"] > 0}
        facts |= {"scale": SCALE[trial["settings"]["augmentation"]], **trial["settings"]}
        return [self.given["fastai_python"], ROOT / "bench/minutes_fastai.py", json.dumps(facts)]


def run_on(core, command, log):
    """Run a command with one thread on one core, its output in `log`; returns its seconds of wall and of CPU.

    It ends with the thread that called. Raises RuntimeError if it fails.
    """
    words = ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", core, *command]
    environment, started = {**os.environ, "OMP_NUM_THREADS": "1"}, time.monotonic()
    with open(log, "w") as stream:
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=stream, stderr=stream, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{shlex.join(process.args)} ended with status {process.returncode} ({log}):\n{tail}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime


def read_ours(out):
    """Return top-1 of the evaluation after the last step, and that step."""
    row = [row for row in RunReader(out / "run").rows if row["kind"] == "evaluate"][-1]
    return {"top1": row["top1"], "steps": row["step"]}


def read_timm(out):
    """Return top-1 after the last step, the steps, and their seconds, the first one's being those of the others."""
    lines = [(int(epoch), int(update) + 1, float(rate)) for epoch, update, rate in
             TIMM_LINE.findall((out / "output.log").read_text())]  # fmt: skip
    last = {epoch: (updates, updates * BATCH / rate) for epoch, updates, rate in lines}
    steps, seconds = map(sum, zip(*last.values()))
    with open(out / "run/summary.csv", newline="") as stream:
        top1 = list(csv.DictReader(stream))[-1].get("eval_top1", 0)
    return {
        "top1": float(top1) / 100,
        "steps": steps,
        "train_sec": (seconds - BATCH / lines[0][2]) * steps / (steps - 1),
    }


def read_fastai(out):
    """Return what bench/minutes_fastai.py printed last."""
    return json.loads((out / "output.log").read_text().splitlines()[-1])


def table(rows):
    """Return rows of the journal as a table: a line for each collection, minutes and arm."""
    lines = [("collection", "minutes", "arm", "top-1 (least to greatest)", "our errors / theirs", "steps", "training s",
              "wall s", "CPU s", "trials", "best settings")]  # fmt: skip
    groups = {}
    for row in rows:
        if row["minutes"]:
            groups.setdefault((row["name"], row["minutes"]), {}).setdefault(row["arm"], []).append(row)
    for (name, minutes), arms in sorted(groups.items()):
        best = {arm: best_of(arms[arm]) for arm in NEEDS if arm in arms}
        error = {arm: 1 - statistics.mean(row["top1"] for row in best[arm]) for arm in best}
        for arm, found in best.items():
            top1 = [row["top1"] for row in found]
            ratio = f"{error['ours'] / error[arm]:.3f}" if "ours" in error and arm != "ours" and error[arm] else ""
            means = [statistics.mean(row.get(key, row["wall_sec"]) for row in found)
                     for key in ("steps", "train_sec", "wall_sec", "cpu_sec")]  # fmt: skip
            lines.append((
                name, f"{minutes:g}", arm, f"{1 - error[arm]:.4f} ({min(top1):.4f} to {max(top1):.4f})", ratio,
                *[f"{mean:.0f}" for mean in means], str(sum(row["seed"] == 0 for row in arms[arm])),
                " ".join(map(str, found[0]["settings"].values())),
            ))  # fmt: skip
    return align_columns(lines)


def best_of(rows):
    """Return the rows with the settings that have the best top-1 with seed 0."""
    best = max((row for row in rows if row["seed"] == 0), key=lambda row: row["top1"])
    return [row for row in rows if row["settings"] == best["settings"]]


def draw_quick(root):
    """Write two collections of two classes of random images."""
    draws = np.random.default_rng(0)
    for name, split, label, number in itertools.product("ab", ("train", "val"), "xy", range(16)):
        file = root / name / split / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16), np.uint8)).save(file)


def main():
    words = sys.argv[1:]
    is_quick = "quick" in words
    out, names, seeds = (OUT / "quick", "a,b", "1") if is_quick else (OUT, "glyphs,fashion,emoji,textures", "3")
    given = {
        "minutes": "2", "collections": str(out / "collections"), "names": names, "arms": None, "timm_script": None,
        "fastai_python": None, "seeds": seeds, "cores": "0", "screen": None, "journal": str(out / "minutes.jsonl"),
    }  # fmt: skip
    for word in words:
        key, equals, value = word.partition("=")
        if word not in ("quick", "table") and not (equals and key in given):
            sys.exit(f"minutes: {word!r} is neither table, quick nor KEY=VALUE with a key of {', '.join(given)}")
        given |= {key: value} if equals else {}
    given["arms"] = given["arms"] or ",".join(arm for arm, need in NEEDS.items() if given.get(need, True))
    for arm in given["arms"].split(","):
        if arm not in NEEDS or not given.get(NEEDS[arm], True):
            sys.exit(
                f"minutes: arms={arm}: " + (f"give {NEEDS[arm]}=FILE" if arm in NEEDS else f"not of {', '.join(NEEDS)}")
            )
    failed = []
    journal = Path(given["journal"])
    if "table" not in words:
        if is_quick:
            draw_quick(Path(given["collections"]))
        if missing := [
            name for name in given["names"].split(",") if not (Path(given["collections"]) / name / "train").is_dir()
        ]:
            sys.exit(f"minutes: collections={given['collections']} lacks {missing[0]}; see bench/four_collections.py")
        with file_lock(journal, f"journal: another bench writes {journal}"):
            failed = Bench(given, is_quick).run()
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    sys.stdout.write(f"{table(rows)}\n{journal}\n")
    sys.exit(f"minutes: {len(failed)} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
