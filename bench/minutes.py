"""Ours against tuned rivals on equal time: `train.py loop.minutes=M` at its defaults, timm's script, fastai.

    python bench/minutes.py [minutes=2] [collections=FOLDER] [names=glyphs,...] [arms=ours,timm,fastai] [seeds=3]
        [timm_script=TIMM/train.py] [fastai_python=PYTHON] [cores=0,1] [screen=MINUTES] [finalists=4] [journal=PATH]
        [table] [quick]

collections: what bench/four_collections.py drew: NAME and NAME_tenth. timm_script: `train.py` of a checkout of
huggingface/pytorch-image-models that fits the installed timm and has --train-batches-per-epoch. fastai_python: an
interpreter with fastai and this torch: `python -m venv F`, the path of this site-packages in a file
F/lib/python3.*/site-packages/x.pth, `F/bin/python -m pip install fastai`. An arm that lacks its word is left out.

Each run has one core (`taskset`) and one thread; each of `cores` takes one run at a time. Ours has its minutes from
typing to the end of the process. A rival has a trial of each combination of RATES and SETTINGS, on each collection and
for each time, with seed 0; its best, by top-1 of the last weights on val, runs with the other seeds, too. Its minutes
are those of training steps: starting, the first batch, evaluating and the search for the best trial do not count, which
favours it. The steps that fit are counted from the last three runs of the same network, size and augmentation, at first
from one of CALIBRATION_STEPS. screen: the trials run for so many minutes, and only the best `finalists` for all.

Another process on a core makes wall time lie, so steps are counted by CPU seconds, and a run is told whose wall and CPU
time differ by more than 10 %. The journal (outputs/bench/minutes.jsonl) has every run of a machine; a killed bench that
is typed again goes on. After a change of ours, delete its lines. `table` only prints. quick: a few steps, tiny images.
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

from PIL import Image

from bench.measure import OUT
from tests.support import make_collection
from utils.config.help import ROOT
from utils.hardware import has_fast_bf16
from utils.io.files import file_lock
from utils.io.journal import Journal
from utils.record.figures import show_rows
from utils.record.run_reader import RunReader

NAMES = "glyphs,fashion,emoji,textures"
RATES = {"timm": [1e-3, 3e-3], "fastai": [3e-3, 1e-2]}  # the highest of a run
SETTINGS = {
    "timm": {"network": ["resnet18", "resnet10t"], "augmentation": ["mild", "strong"], "size_px": [48, 64]},
    "fastai": {"augmentation": ["mild", "strong"], "size_px": [32, 48, 64]},
}
SCALE = {"mild": 0.7, "strong": 0.35}  # the least area of a crop; `strong` adds what the rival's users add
NOT_MIRRORED = ["glyphs", "glyphs_tenth"]  # a user knows that a mirrored letter is another one
CALIBRATION_STEPS, BATCH = 20, 64
# At 32 px float32 takes 0.9 of the time of bf16 with channels_last, whose casts of the weights cost most; at 64 px 1.4.
BF16_FROM_PX = 48
# timm counts in whole epochs: a run is cut into EPOCHS "epochs" of a tenth of the steps, each a fresh random draw.
EPOCHS = 10
TIMM = shlex.split(
    f"--device cpu --workers 0 --batch-size {BATCH} --validation-batch-size 256 --opt adamw "
    "--opt-kwargs fused=True --weight-decay 0.05 --clip-grad 1.0 --smoothing 0.1 --sched-on-updates --warmup-epochs 1 "
    "--warmup-lr 1e-6 --crop-pct 1.0 --interpolation bilinear --train-interpolation bilinear --checkpoint-hist 1 "
    f"--log-interval 10 --epochs {EPOCHS} --val-interval {EPOCHS}"
)
TIMM_JITTER = {"mild": ["--color-jitter", "0"], "strong": ["--color-jitter", "0.2", "--reprob", "0.2"]}
# `Train: 0 [  10/30 ( 37%)]  ...  Time: 0.191s,  334.74/s  (0.328s,  195.01/s)`: the mean rate of the epoch so far.
TIMM_LINE = re.compile(r"Train: (\d+) \[ *(\d+)/.*?Time: .*?\(.*?s, +([\d.]+)/s\)")
MEANS = ["steps", "train_sec", "wall_sec", "cpu_sec"]  # columns of the table
QUICK_WORDS = ["loop.total_steps=4", "loop.batch_size=8", "augment.image_size_hw=[32,32]"]
ARMS, NEEDS = ["ours", "timm", "fastai"], {"timm": "timm_script", "fastai": "fastai_python"}


def make_trial(arm, name, minutes, seed=0, settings=None):
    """Return one run; minutes: 0 for a calibration, which is not evaluated."""
    trial = {"arm": arm, "name": name, "minutes": minutes, "seed": seed, "settings": settings or {}}
    words = [arm, name, f"{minutes:g}min", f"seed{seed}", *trial["settings"].values()]
    return {"trial": "-".join(map(str, words)), **trial}


class Bench:
    """The runs that were asked for. The journal says which are next; a thread of each core takes them in turn."""

    def __init__(self, given):
        self.given, self.is_quick = given, "quick" in sys.argv
        self.minutes, self.seeds = float(given["minutes"]), int(given["seeds"])
        self.root, self.file = Path(given["collections"]).absolute(), Path(given["journal"]).absolute()
        self.journal = Journal(self.file, "bench/minutes.py")
        self.running, self.failed, self.lock = set(), set(), threading.Lock()

    def run(self):
        """Make all runs that the journal lacks; returns the names of those that failed."""
        cores = self.given["cores"].split(",")  # threads of a pool would go on after Ctrl-C
        threads = [threading.Thread(target=self._work, args=[core], daemon=True) for core in cores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.failed

    def _work(self, core):
        while (trial := self._take()) is not None:
            if not trial:  # what comes next depends on a run of another core
                time.sleep(0.1)
                continue
            try:
                self._run(trial, core)
            except Exception as error:  # the other runs go on
                sys.stderr.write(f"{trial['trial']}: {error}\n")
                self.failed.add(trial["trial"])
            self.running.discard(trial["trial"])

    def _take(self):
        """Return the next run, those of the first collections first; {} if none can start yet, None if none will."""
        with self.lock:
            rows = {row["trial"]: row for row in self.journal.parts()}
            for name, arm in itertools.product(self.given["names"].split(","), self.given["arms"].split(",")):
                for trial in self._next(name, arm, rows):
                    if trial["trial"] not in {*rows, *self.running, *self.failed}:
                        self.running.add(trial["trial"])
                        return trial
            return {} if self.running else None

    def _next(self, name, arm, rows):
        """Return the runs of an arm's first unfinished stage: screening, trials, seeds."""
        if arm == "ours":
            return [make_trial(arm, name, self.minutes, seed) for seed in range(self.seeds)]
        grid = itertools.product(RATES[arm], *SETTINGS[arm].values())
        settings = [dict(zip(["rate", *SETTINGS[arm]], values)) for values in grid][: 2 if self.is_quick else None]
        for minutes in [*([float(self.given["screen"])] if self.given["screen"] else []), self.minutes]:
            trials = [make_trial(arm, name, minutes, 0, each) for each in settings]
            if any(trial["trial"] not in rows for trial in trials):
                return trials
            trials.sort(key=lambda trial: -rows[trial["trial"]]["top1"])
            settings = [trial["settings"] for trial in trials[: int(self.given["finalists"])]]
        return [make_trial(arm, name, self.minutes, seed, settings[0]) for seed in range(1, self.seeds)]

    def _run(self, trial, core):
        """Run a trial on a core and add its row to the journal; returns the row."""
        steps = None if trial["arm"] == "ours" else self._count_steps(trial, core)
        out = self.file.with_suffix("") / trial["trial"]
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        wall_sec, cpu_sec = run_on(core, self._command(trial, out, steps), out / "output.log")
        read = {"ours": read_ours, "timm": read_timm, "fastai": lambda _, text: json.loads(text.splitlines()[-1])}
        found = read[trial["arm"]](out / "run", (out / "output.log").read_text(errors="replace"))
        row = {**trial, **found, "wall_sec": round(wall_sec, 1), "cpu_sec": round(cpu_sec, 1), "core": core}
        with self.lock:
            self.journal.add(row)
        busy = "" if 0.9 < cpu_sec / wall_sec < 1.1 else "; WALL AND CPU TIME DIFFER: is the core busy?"
        found = f"top-1 {row['top1']:.4f}, {row['steps']} steps, {wall_sec:.1f} s, CPU {cpu_sec:.1f} s{busy}"
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} core {core}, {trial['trial']}: {found}\n")
        shutil.rmtree(out / "run", ignore_errors=True)  # weights
        return row

    def _count_steps(self, trial, core):
        """Return how many steps of a rival fit into its minutes, in multiples of EPOCHS."""
        if self.is_quick or not trial["minutes"]:
            return EPOCHS if self.is_quick else CALIBRATION_STEPS
        kind = {**trial["settings"], "arm": trial["arm"], "name": trial["name"], "rate": None}
        with self.lock:
            rows = [{**row["settings"], **row, "rate": None} for row in self.journal.parts()]
        rows = [row for row in rows if kind.items() <= row.items()][-3:]
        rows = rows or [self._run(make_trial(trial["arm"], trial["name"], 0, 0, trial["settings"]), core)]
        speeds = [row["train_sec"] * min(1.0, row["cpu_sec"] / row["wall_sec"]) / row["steps"] for row in rows]
        return max(EPOCHS, round(60 * trial["minutes"] / statistics.median(speeds) / EPOCHS) * EPOCHS)

    def _command(self, trial, out, steps):
        root, settings, seed = self.root / trial["name"], trial["settings"], trial["seed"]
        if trial["arm"] == "ours":
            words = QUICK_WORDS if self.is_quick else [f"loop.minutes={trial['minutes']:g}"]
            return [sys.executable, "train.py", f"data.root={root}", f"run_dir={out / 'run'}", f"seed={seed}", *words]
        size_px, augmentation, flips = settings["size_px"], settings["augmentation"], trial["name"] not in NOT_MIRRORED
        bf16 = has_fast_bf16("cpu") and size_px >= BF16_FROM_PX
        with Image.open(next((root / "train").glob("*/*.png"))) as image:
            channels = 1 if image.mode == "L" else 3
        if trial["arm"] == "fastai":
            facts = {**settings, "root": str(root), "seed": seed, "steps": steps, "evaluate": trial["minutes"] > 0}
            facts |= {"scale": SCALE[augmentation], "flips": flips, "channels": channels, "batch": BATCH, "bf16": bf16}
            return [self.given["fastai_python"], ROOT / "bench/minutes_fastai.py", json.dumps(facts)]
        return [
            sys.executable, Path(self.given["timm_script"]).absolute(), *TIMM, "--model", settings["network"],
            "--data-dir", root, "--seed", seed,
            "--num-classes", len(list((root / "train").iterdir())), "--in-chans", channels, "--mean", *[0.5] * channels,
            "--std", *[0.5] * channels, "--img-size", size_px, "--train-img-sizes", size_px, "--lr", settings["rate"],
            "--scale", SCALE[augmentation], 1.0, "--hflip", 0.5 * flips, *TIMM_JITTER[augmentation],
            *(["--amp", "--amp-dtype", "bfloat16", "--channels-last"] if bf16 else []),
            "--train-batches-per-epoch", steps // EPOCHS, "--val-split", "val" if trial["minutes"] else "",
            "--output", out, "--experiment", "run",
        ]  # fmt: skip


def run_on(core, command, log):
    """Run a command with one thread on one core, its output in `log`; returns its seconds of wall and of CPU.

    It ends with the thread that called. Raises RuntimeError if it fails.
    """
    words = list(map(str, ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", core, *command]))
    environment, started = {**os.environ, "OMP_NUM_THREADS": "1"}, time.monotonic()
    with open(log, "w") as stream:
        process = subprocess.Popen(words, cwd=ROOT, stdout=stream, stderr=stream, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"status {process.returncode}, {log}:\n{log.read_text(errors='replace')[-2000:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime


def read_ours(run, text):
    """Return top-1 of the evaluation after the last step, and that step."""
    row = [row for row in RunReader(run).rows if row["kind"] == "evaluate"][-1]
    return {"top1": row["top1"], "steps": row["step"]}


def read_timm(run, text):
    """Return top-1 after the last step, the steps, and their seconds; the first, which reads, counts as the others."""
    lines = TIMM_LINE.findall(text)
    last = {epoch: (int(update) + 1, (int(update) + 1) * BATCH / float(rate)) for epoch, update, rate in lines}
    steps, seconds = map(sum, zip(*last.values()))
    with open(run / "summary.csv", newline="") as stream:
        top1 = float(list(csv.DictReader(stream))[-1].get("eval_top1", 0)) / 100
    return {"top1": top1, "steps": steps, "train_sec": (seconds - BATCH / float(lines[0][2])) * steps / (steps - 1)}


def table(rows):
    """Return rows of the journal as a table: a line for each collection, minutes and arm."""
    lines, groups = [], {}
    for row in rows:
        if row["minutes"]:
            groups.setdefault((row["name"], row["minutes"], row["arm"]), []).append(row)
    first = {key: max(found, key=lambda row: (row["seed"] == 0, row["top1"])) for key, found in groups.items()}
    best = {key: [row for row in groups[key] if row["settings"] == first[key]["settings"]] for key in groups}
    error = {key: 1 - statistics.mean(row["top1"] for row in found) for key, found in best.items()}
    for key, found in sorted(best.items()):
        top1, ours = [row["top1"] for row in found], error.get((*key[:2], "ours"))
        lines.append({
            **dict(zip(["collection", "minutes", "arm"], key)),
            "top-1 (least to greatest)": f"{1 - error[key]:.4f} ({min(top1):.4f} to {max(top1):.4f})",
            "errors, ours / theirs": ours / error[key] if ours and error[key] and key[2] != "ours" else None,
            **{name: round(statistics.mean(row.get(name, row["wall_sec"]) for row in found)) for name in MEANS},
            "trials": sum(row["seed"] == 0 for row in groups[key]),
            "best settings": " ".join(map(str, found[0]["settings"].values())),
        })  # fmt: skip
    return show_rows(lines) if lines else "no runs"


def read_words(words):
    """Return the values of the command's words."""
    out, names, seeds = (OUT / "quick", "a,b", "1") if "quick" in words else (OUT, NAMES, "3")
    given = {"minutes": "2", "names": names, "seeds": seeds, "cores": str(min(os.sched_getaffinity(0)))}
    given |= {"screen": None, "finalists": "4"}
    given |= {"collections": str(out / "collections"), "journal": str(out / "minutes.jsonl"), "arms": None}
    given |= dict.fromkeys(NEEDS.values())
    for word in words:
        key, equals, value = word.partition("=")
        if word not in ("quick", "table") and not (equals and key in given):
            sys.exit(f"minutes: {word!r} is neither table, quick nor KEY=VALUE with a key of {', '.join(given)}")
        given |= {key: value} if equals else {}
    given["arms"] = given["arms"] or ",".join(arm for arm in ARMS if given.get(NEEDS.get(arm), True))
    for arm in given["arms"].split(","):
        if arm not in ARMS or not given.get(NEEDS.get(arm), True):
            sys.exit(f"minutes: arms={arm}: it is not of {', '.join(ARMS)}, or {NEEDS.get(arm)} is not given")
    for root in (Path(given["collections"]) / name for name in given["names"].split(",")):
        if "quick" in words and not root.exists():
            make_collection(root)
        if "table" not in words and not root.is_dir():
            sys.exit(f"minutes: names: {root} is not a folder; bench/four_collections.py draws them")
    return given


def main():
    given, failed = read_words(sys.argv[1:]), []
    journal = Path(given["journal"])
    if "table" not in sys.argv:
        with file_lock(journal, f"minutes: another bench writes {journal}"):
            failed = Bench(given).run()
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    sys.stdout.write(f"{table(rows)}\n{journal}\n")
    sys.exit(f"minutes: {len(failed)} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
