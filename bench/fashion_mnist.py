"""Fashion-MNIST, top-1 on its 10,000 test images after equal seconds of training: ours against timm's script.

python bench/fashion_mnist.py source=FOLDER [timm_script=PATH] [arms=..] [seconds=240] [seeds=3] [quick]

source: the folder of the four IDX files (`dpkg -L dataset-fashion-mnist`, of Debian's package of that name).
timm_script: `train.py` of a checkout of huggingface/pytorch-image-models that fits the installed timm; without it,
timm's arms are skipped. quick: a few steps per arm of a small network on random images where no source is given.

| arm | what trains for `seconds` |
|---|---|
| pretrained | FCMAE without labels for a third of the seconds, then fine-tuning of its encoder |
| scratch | the same network by the same script without pretraining |
| train_half | train.py with its ResNet-18 and its defaults, for less than half the seconds, its range test included |
| timm_convnextv2 | timm's script with timm's ConvNeXt V2 of the same depths, widths and stem |
| timm_resnet18 | timm's script with resnet18 |
| timm_defaults | timm's script with resnet18 and its own defaults: SGD at 0.05, batches of 128, float32, wide crops |

All arms see grey images of 64 px and are judged by their last weights. The seconds are those of the training steps,
with reading and augmenting their images; starting, compiling (the first ten steps) and evaluating are not counted.
Each arm's milliseconds per step are found by a short run first, then by its run of the seed before. docs/results.md
says what the arms have in common and what was tried for timm's. timm counts in whole epochs, so its run is cut into ten
"epochs" of a tenth of the steps (--train-batches-per-epoch), each a fresh random draw of the training images.
"""

import csv
import json
import os
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import yaml

from bench.commands import ROOT, fail, last_top1, log_of, read_number, read_settings, run_command, step_windows
from bench.measure import describe_machine
from data.idx import FILES, encode_idx
from utils.text_table import align_columns

CLASS_NAMES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle_boot"
PRETRAINING_SHARE = 1 / 3
TRAIN_SHARE = 0.46  # for train_half: the speed drifts, and half of what timm's arm really takes is its limit
EPOCHS = 10  # timm's, see above
WINDOW = 10  # steps per row of figures; the first window, which compiles, is not counted
CALIBRATION_STEPS, QUICK_STEPS = 60, 20
# What makes timm's script train grey images of 64 px on a CPU, in EPOCHS "epochs" with a warm-up of one.
TIMM_COMMON = shlex.split(
    "--device cpu --in-chans 1 --num-classes 10 --img-size 64 --train-img-sizes 64 --mean 0.5 --std 0.5 "
    "--sched-on-updates --warmup-epochs 1 --workers 1 --val-split val --checkpoint-hist 1"
)
# What is the same as ours, or better than the script's defaults.
TIMM_TUNED = shlex.split(
    "--crop-pct 1.0 --interpolation bilinear --train-interpolation bilinear --scale 0.7 1.0 --color-jitter 0 "
    "--smoothing 0.1 --opt adamw --lr 2e-3 --weight-decay 0.05 --clip-grad 1.0 --opt-kwargs fused=True --batch-size 64 "
    "--validation-batch-size 256 --warmup-lr 1e-6"
)
TIMM_FAST = {  # not in quick runs: compiling takes longer than they do
    "timm_convnextv2": ["--amp", "--amp-dtype", "bfloat16", "--channels-last", "--torchcompile"],
    "timm_resnet18": ["--amp", "--amp-dtype", "bfloat16"],
}
TIMM = {
    "timm_convnextv2": ["--model", "convnextv2_atto", *TIMM_TUNED],
    "timm_resnet18": ["--model", "resnet18", *TIMM_TUNED],
    "timm_defaults": ["--model", "resnet18"],
}
OURS = ("pretrained", "scratch", "train_half")
SIZES = ("depths", "dims")


def sec_per_step(windows):
    """Return the mean seconds of a step over (steps, seconds) windows, without the first one, which starts up."""
    counted = windows[1:] or windows
    return sum(seconds for _, seconds in counted) / sum(steps for steps, _ in counted)


class Settings:
    """What a run of the bench was asked for, and the network that all ConvNeXt V2 have."""

    def __init__(self):
        given, self.quick = read_settings(source=None, timm_script=None, arms=None, seconds="240", seeds="3")
        self.seconds = read_number("seconds", given["seconds"], float)
        self.seeds = read_number("seeds", "1" if self.quick else given["seeds"], int)
        self.timm_script, self.source = given["timm_script"], given["source"]
        if self.source is None and not self.quick:
            fail("source is not given; name the folder of the four IDX files")
        if self.timm_script is not None and not Path(self.timm_script).is_file():
            fail(f"timm_script={self.timm_script} is not a file; name train.py of timm's checkout")
        known = OURS if self.timm_script is None else (*OURS, *TIMM)
        self.arms = given["arms"].split(",") if given["arms"] else list(known)
        if wrong := [arm for arm in self.arms if arm not in known]:
            fail(f"arms: {wrong[0]!r} is not one of {', '.join(known)}")
        self.out = ROOT / "outputs/bench" / ("quick/fashion_mnist" if self.quick else "fashion_mnist")
        self.root = str(self.out / "collection") if self.quick else "collections/fashion_mnist"
        self.model = yaml.safe_load((ROOT / "conf/experiment/fashion_mnist/scratch.yaml").read_text())["model"]
        if self.quick:
            self.model |= {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}


class OurTraining:
    """One kind of training of ours, pretrain or finetune or scratch; `run` gives the steps what they need."""

    def __init__(self, settings, kind):
        self.settings, self.kind = settings, kind

    def words(self, steps):
        """Return the script and its own settings."""
        return [
            "pretrain_fcmae.py" if self.kind == "pretrain" else "finetune.py", f"experiment=fashion_mnist/{self.kind}",
            f"schedule.warmup_steps={steps // 10}",
            *(f"model.{key}={self.settings.model[key]}".replace(" ", "") for key in SIZES),
        ]  # fmt: skip

    def run(self, name, seed, steps, init_from=None):
        """Train; returns the mean seconds of a step."""
        self.folder = self.settings.out / name
        command = [
            sys.executable, *self.words(steps), f"run_dir={self.folder}", f"seed={seed}",
            f"data.root={self.settings.root}", f"loop.total_steps={steps}", f"loop.log_every_steps={WINDOW}",
            "runtime.compile=false",
        ]  # fmt: skip
        run_command([*command, *([f"init_from={init_from}"] if init_from else [])], log_of(self.folder))
        return sec_per_step(step_windows(self.folder))

    def top1(self):
        """Return top-1 of the evaluation after the last step."""
        return last_top1(self.folder)


class TrainTraining(OurTraining):
    """train.py at its defaults, but for the size, the grey of the images and what a bench does not need."""

    def words(self, steps):
        """Return the script and its own settings."""
        return [
            "train.py", "data=image_folder", "model.in_channels=1", "augment.image_size_hw=[64,64]",
            "augment.mean=[0.5]", "augment.std=[0.5]", "tracking.live_plots=false",
            *(["loop.global_batch_size=16"] if self.settings.quick else []),
            "loop.evaluate_every_epochs=1.0e+9", "loop.checkpoint_every_steps=1000000000",
        ]  # fmt: skip

    def run(self, name, seed, steps):
        """Train; returns the mean seconds of a step, its share of the range test's included.

        Runs of less than 300 steps, as in calibration, are too short for a range test.
        """
        after, file = super().run(name, seed, steps), self.folder / "lr_finder.json"
        if not file.exists():
            return after
        test = json.loads(file.read_text())
        return after + (test["seconds"] - test["first_update_sec"]) / steps


class TimmTraining:
    """timm's script with one network."""

    # `Train: 0 [  10/30 ( 37%)]  ...  Time: 0.191s,  334.74/s  (0.328s,  195.01/s)`: the mean rate of the epoch so far.
    LINE = re.compile(r"Train: (\d+) \[ *(\d+)/.*?Time: .*?\(.*?s, +([\d.]+)/s\)")

    def __init__(self, settings, arm):
        self.settings, self.arguments = settings, [*TIMM_COMMON, *TIMM[arm]]
        self.batch = 64 if "--batch-size" in self.arguments else 128
        if arm == "timm_convnextv2":
            sizes = {key: tuple(settings.model[key]) for key in SIZES} | {"patch_size": settings.model["stem_stride"]}
            self.arguments += ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in sizes.items())]
        if not settings.quick:
            self.arguments += TIMM_FAST.get(arm, [])

    def run(self, name, seed, steps):
        """Train; returns the mean seconds of a step."""
        log = self.settings.out / f"{name}.log"
        run_command(
            [
                sys.executable, os.path.abspath(self.settings.timm_script), *self.arguments,
                "--data-dir", ROOT / self.settings.root, "--seed", str(seed), "--log-interval", str(WINDOW),
                "--epochs", str(EPOCHS), "--val-interval", str(EPOCHS),
                "--train-batches-per-epoch", str(max(1, steps // EPOCHS)),
                "--output", self.settings.out, "--experiment", name,
            ],
            log,
        )  # fmt: skip
        with open(self.settings.out / name / "summary.csv", newline="") as stream:
            self.summary = list(csv.DictReader(stream))
        return sec_per_step(self.windows(log.read_text()))

    def windows(self, text):
        """Return (steps, seconds) of what the script's lines tell apart: the start, and the rest of each epoch."""
        epochs = {}
        for epoch, update, rate in self.LINE.findall(text):
            done = int(update) + 1
            epochs.setdefault(int(epoch), []).append((done, done * self.batch / float(rate)))
        first = next((window for window in epochs[0] if window[0] >= WINDOW), epochs[0][-1])
        rest = tuple(last - start for last, start in zip(epochs[0][-1], first))
        return [first, *([rest] if rest[0] else []), *(lines[-1] for epoch, lines in epochs.items() if epoch)]

    def top1(self):
        """Return top-1 of the evaluation after the last step."""
        return float(self.summary[-1]["eval_top1"]) / 100


class Bench:
    """All arms over all seeds; `speeds` are the newest seconds per step of each kind of training."""

    def __init__(self, settings):
        self.settings = settings
        self.trainings = {kind: OurTraining(settings, kind) for kind in ("pretrain", "finetune", "scratch")}
        self.trainings["train_half"] = TrainTraining(settings, "train")
        self.trainings |= {arm: TimmTraining(settings, arm) for arm in settings.arms if arm in TIMM}
        self.speeds = {}
        self.found = {arm: {"top1": [], "seconds": [], "steps": []} for arm in settings.arms}

    def calibrate(self):
        """Find the seconds per step of each kind of training by a short run; fine-tuning's are those of scratch."""
        own = {"pretrain", "scratch"} if "pretrained" in self.found else set()
        for kind in sorted(own | self.found.keys() - {"pretrained"}):
            self.speeds[kind] = self.trainings[kind].run(f"calibrate_{kind}", 0, CALIBRATION_STEPS)
        self.speeds["finetune"] = self.speeds.get("scratch")

    def train(self, kind, seed, seconds, **more):
        """Train for `seconds`; returns (steps, seconds really used, name of the run)."""
        steps = QUICK_STEPS
        if not self.settings.quick:
            steps = max(2 * WINDOW, round(seconds / self.speeds[kind] / EPOCHS) * EPOCHS)
        name = f"{kind}_{seed}"
        self.speeds[kind] = self.trainings[kind].run(name, seed, steps, **more)
        return steps, steps * self.speeds[kind], name

    def run_arm(self, arm, seed):
        """Run one arm with one seed, and note what it found."""
        total, runs = self.settings.seconds, []
        if arm == "pretrained":
            runs.append(self.train("pretrain", seed, total * PRETRAINING_SHARE))
            rest = total - runs[0][1]  # what pretraining really left
            runs.append(self.train("finetune", seed, rest, init_from=self.settings.out / runs[0][2]))
        else:
            runs.append(self.train(arm, seed, total * TRAIN_SHARE if arm == "train_half" else total))
        top1 = self.trainings["finetune" if arm == "pretrained" else arm].top1()
        note = self.found[arm]
        note["top1"].append(round(top1, 4))
        note["seconds"].append(round(sum(seconds for _, seconds, _ in runs), 1))
        note["steps"].append([steps for steps, _, _ in runs])
        sys.stderr.write(f"{arm}, seed {seed}: top-1 {top1:.4f} after {note['seconds'][-1]} s\n")

    def run(self):
        """Run everything, the arms in turns; returns the results by arm."""
        if not self.settings.quick:
            self.calibrate()
        for seed in range(self.settings.seeds):
            for arm in self.found:
                self.run_arm(arm, seed)
        for note in self.found.values():
            note["mean"] = round(statistics.mean(note["top1"]), 4)
            note["min_max"] = [min(note["top1"]), max(note["top1"])]
        return self.found


def make_random_source(folder):
    """Write IDX files of random images, 400 for training and 100 for validation."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for (images, labels), count in zip(FILES.values(), (400, 100)):
        (folder / images).write_bytes(encode_idx(draw.integers(0, 256, (count, 28, 28), np.uint8)))
        (folder / labels).write_bytes(encode_idx((np.arange(count) % 10).astype(np.uint8)))


def table(found):
    """Return the results as a table."""
    lines = [("arm", "top-1, mean", "least to greatest", "seconds", "steps")]
    for arm, note in found.items():
        low, high = note["min_max"]
        seconds = statistics.mean(note["seconds"])
        steps = " + ".join(f"{statistics.mean(column):.0f}" for column in zip(*note["steps"]))
        lines.append((arm, f"{note['mean']:.4f}", f"{low:.4f} to {high:.4f}", f"{seconds:.1f}", steps))
    return align_columns(lines)


def main():
    settings = Settings()
    if settings.out.exists():  # of an earlier run of this bench
        shutil.rmtree(settings.out)
    if settings.source is None:
        settings.source = settings.out / "source"
        make_random_source(settings.source)
    run_command(
        [
            sys.executable, "prepare.py", "job=idx", f"source={settings.source}", "data=image_folder",
            f"data.root={settings.root}", f"class_names=[{CLASS_NAMES}]",
        ],
        settings.out / "prepare.log",
    )  # fmt: skip
    found = Bench(settings).run()
    path = settings.out.with_suffix(".json")
    machine = describe_machine(torch.device("cpu"))
    report = {"machine": machine, "seconds": settings.seconds, "quick": settings.quick, "arms": found}
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{table(found)}\n{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
