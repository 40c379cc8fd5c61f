"""Ours beside simpler things, from the same pretrained weights, in equal minutes of one core.

    python bench/minutes.py [minutes=2] [collections=FOLDER] [names=trash,...] [arms=ours,timm,regressions] [seeds=1]
        [core=0] [journal=PATH] [timm_script=TIMM/train.py]

collections: a folder of NAME/{train,val}/CLASS/*. timm_script: `train.py` of a checkout of
huggingface/pytorch-image-models that fits the installed timm and has --train-batches-per-epoch. The weights of NETWORK
are in timm's cache: HF_HOME says where. For two cores, start two commands with names, cores and journals of their own.

Each run has one core (`taskset`) and one thread. Ours has its minutes from typing to the end of the process. timm's
script has a run for each of RATES, its minutes are those of training steps: starting, the first batch and evaluating do
not count. The steps that fit are counted by the last three runs on the collection, at first one of CALIBRATION_STEPS.
Regressions on frozen features (bench/regressions.py) have a run for each of SIZES; one counts if the features of the
training images and its fit take at most the minutes. The images that judge choose the best rate, size and regression,
which favours the rivals.

Another process on the core makes wall time lie: rivals are timed by CPU seconds, and a run of ours counts if its two
times agree. The journal (outputs/bench/minutes.jsonl) has every run of a machine; a killed bench
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
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu import read_words
from bench.measure import OUT
from utils.config.help import ROOT
from utils.io.files import file_lock
from utils.io.journal import Journal
from utils.record.figures import show_rows
from utils.record.run_reader import RunReader

DEFAULTS = {
    "minutes": "2",
    "collections": str(OUT / "collections"),
    "names": "",
    "arms": "ours,timm,regressions",
    "seeds": "1",
    "core": str(min(os.sched_getaffinity(0))),
    "journal": str(OUT / "minutes.jsonl"),
    "timm_script": "train.py",
}
NETWORK = "tf_efficientnet_lite0.in1k"
RATES = [3e-3, 1e-3, 1e-2]
SIZES = [96, 128, 160, 224]
CALIBRATION_STEPS = 20
BATCH = 64
# timm counts in whole epochs: a run is cut into EPOCHS "epochs" of a tenth of the steps, each a fresh random draw.
EPOCHS = 10
# Without AMP: float32 took 11 ms an image of 96 px, bf16 15 (AMD EPYC with AVX-512).
TIMM = shlex.split(
    f"--model {NETWORK} --pretrained --img-size 96 --train-img-sizes 96 --channels-last --scale 0.7 1.0 "
    f"--color-jitter 0 --device cpu --workers 0 --batch-size {BATCH} --validation-batch-size 256 --opt adamw "
    "--opt-kwargs fused=True --weight-decay 0.05 --clip-grad 1.0 --smoothing 0.1 --sched-on-updates --warmup-epochs 1 "
    "--warmup-lr 1e-6 --crop-pct 1.0 --interpolation bilinear --train-interpolation bilinear --checkpoint-hist 1 "
    f"--log-interval 10 --epochs {EPOCHS} --val-interval {EPOCHS}"
)
# `Train: 0 [  10/30 ( 37%)]  ...  Time: 0.191s,  334.74/s  (0.328s,  195.01/s)`: the mean rate of the epoch so far.
TIMM_LINE = re.compile(r"Train: (\d+) \[ *(\d+)/.*?Time: .*?\(.*?s, +([\d.]+)/s\)")


def make_trial(arm, name, minutes, **setting):
    """Return one run; minutes: 0 for a calibration, which is not evaluated; None for regressions, which need theirs."""
    words = [arm, name, minutes, *setting.values()]
    return {"trial": "-".join(map(str, words)), "arm": arm, "name": name, "minutes": minutes, **setting}


class Bench:
    """The runs that were asked for. The journal says which of them are left."""

    def __init__(self, given):
        self.given = given
        self.minutes = float(given["minutes"])
        self.root = Path(given["collections"]).absolute()
        self.file = Path(given["journal"]).absolute()
        self.journal = Journal(self.file, "bench/minutes.py")

    def run(self):
        """Make all runs that the journal lacks, those of the first collections first."""
        names = self.given["names"].split(",") if self.given["names"] else sorted(os.listdir(self.root))
        settings = {
            "ours": [{"seed": seed} for seed in range(int(self.given["seeds"]))],
            "timm": [{"rate": rate} for rate in RATES],
            "regressions": [{"size_px": size_px} for size_px in SIZES],
        }
        for name, arm in itertools.product(names, self.given["arms"].split(",")):
            minutes = None if arm == "regressions" else self.minutes
            for setting in settings[arm]:
                trial = make_trial(arm, name, minutes, **setting)
                if trial["trial"] not in {row["trial"] for row in self.journal.parts()}:
                    self._run(trial)

    def _run(self, trial):
        """Run a trial and add its rows to the journal; returns the rows."""
        out = self.file.with_suffix("") / trial["trial"]
        command, read = getattr(self, f"_prepare_{trial['arm']}")(trial, out)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        wall_sec, cpu_sec = run_on(self.given["core"], command, out / "output.log")
        rows = [{**trial, **found, "wall_sec": round(wall_sec, 1), "cpu_sec": round(cpu_sec, 1)} for found in read(out)]
        for row in rows:
            self.journal.add(row)
            sys.stderr.write(f"{row}\n")
        shutil.rmtree(out / "run", ignore_errors=True)  # weights
        return rows

    def _count_steps(self, name):
        """Return how many steps of timm's fit into the minutes, in multiples of EPOCHS."""
        rows = [row for row in self.journal.parts() if row["arm"] == "timm" and row["name"] == name]
        rows = rows[-3:] or self._run(make_trial("timm", name, 0.0, rate=RATES[0]))
        step_sec = [row["train_sec"] * min(1.0, row["cpu_sec"] / row["wall_sec"]) / row["steps"] for row in rows]
        epochs = round(60 * self.minutes / statistics.median(step_sec) / EPOCHS)
        return EPOCHS * max(1, epochs)

    def _prepare_regressions(self, trial, out):
        words = [self.root / trial["name"], NETWORK, trial["size_px"]]
        return [sys.executable, "bench/regressions.py", *words], read_regressions

    def _prepare_ours(self, trial, out):
        words = [
            f"data.root={self.root / trial['name']}", f"run_dir={out / 'run'}", f"seed={trial['seed']}",
            f"loop.minutes={trial['minutes']:g}",
        ]  # fmt: skip
        return [sys.executable, "train.py", *words], read_ours

    def _prepare_timm(self, trial, out):
        root = self.root / trial["name"]
        is_judged = trial["minutes"] > 0
        steps = self._count_steps(trial["name"]) if is_judged else CALIBRATION_STEPS
        values = {
            "--lr": trial["rate"],
            "--data-dir": root,
            "--num-classes": len(os.listdir(root / "train")),
            "--train-batches-per-epoch": steps // EPOCHS,
            "--val-split": "val" if is_judged else "",
            "--output": out,
            "--experiment": "run",
        }
        script = Path(self.given["timm_script"]).absolute()
        return [sys.executable, script, *TIMM, *itertools.chain(*values.items())], read_timm


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


def read_regressions(out):
    """Return what each regression printed; warnings are between."""
    lines = (out / "output.log").read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def read_ours(out):
    """Return top-1 of the evaluation after the last step, and that step."""
    row = [row for row in RunReader(out / "run").rows if row["kind"] == "evaluate"][-1]
    return [{"top1": row["top1"], "steps": row["step"]}]


def read_timm(out):
    """Return top-1 after the last step, the steps, and their seconds; the first, which reads, counts as the others."""
    lines = TIMM_LINE.findall((out / "output.log").read_text(errors="replace"))
    last = {epoch: (int(update) + 1, float(rate)) for epoch, update, rate in lines}
    steps = sum(updates for updates, _ in last.values())
    seconds = sum(updates * BATCH / rate for updates, rate in last.values())
    first_sec = BATCH / float(lines[0][2])
    with open(out / "run/summary.csv", newline="") as stream:
        top1 = float(list(csv.DictReader(stream))[-1].get("eval_top1", 0)) / 100
    return [{"top1": top1, "steps": steps, "train_sec": (seconds - first_sec) * steps / (steps - 1)}]


def compare(rows, minutes):
    """Yield a line for each collection: the mean of our seeds, the best of each rival, errors over the best."""
    for name in sorted({row["name"] for row in rows}):
        found = defaultdict(list)
        for row in rows:
            is_in_time = row["minutes"] is None and row["train_sec"] <= 60 * minutes
            if row["name"] == name and (is_in_time or row["minutes"] == minutes):
                found[row["arm"]].append(row["top1"])
        ours = found.pop("ours", None)
        if ours and found:
            best = {arm: max(found[arm]) for arm in sorted(found)}
            top1 = statistics.mean(ours)
            yield {"name": name, "ours": top1, **best, "errors": (1 - top1) / (1 - max(best.values()))}


def main():
    given = read_words(DEFAULTS, sys.argv[1:])
    journal = Path(given["journal"])
    with file_lock(journal, f"minutes: another bench writes {journal}"):
        bench = Bench(given)
        bench.run()
    lines = list(compare(list(bench.journal.parts()), bench.minutes))
    if lines:
        mean = statistics.geometric_mean(line["errors"] for line in lines)
        sys.stdout.write(f"{show_rows(lines)}\nerrors in the geometric mean: {mean:.3f}\n")


if __name__ == "__main__":
    main()
