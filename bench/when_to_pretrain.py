"""When pretraining pays: top-1 against total seconds, for all labels of the glyphs and for few.

python bench/when_to_pretrain.py [KEY=VALUE ...] [quick]          (on an idle machine; hours with the defaults)

    arms=resnet18,convnext,fcmae
    labels=all,two_faces,few         12,298 labels of 958 characters; 2,050, of two faces; 500, of 250 characters
    minutes=1,2.5,5,10,20,40  seeds=3  out=outputs/bench/when_to_pretrain

Every arm gets the same seconds, pretraining included. Its steps follow from the seconds of a step, which are measured
first, alone, in turns, and kept in speeds.json: so a run that other work slows down still has the steps of an idle
machine.
Start-up, evaluation and drawing are not counted, on any side; start-up includes the fit of FCMAE's head, some seconds.
Each result is a row of results.jsonl; the same command goes on where it was stopped. It ends with a table, table.md:
means over the seeds, and their spread.

The validation split is a typeface that no arm has seen.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.commands import (
    ROOT,
    fail,
    last_top1,
    log_of,
    read_number,
    read_rows,
    read_settings,
    run_command,
    step_windows,
)
from bench.measure import read_group
from data.config import DataConfig
from data.image_data import load_collection
from utils.record.run_config import is_complete

FACES = ("DejaVuSans", "DejaVuSerif")
FEW_CLASSES = 250
CALIBRATION_STEPS, QUICK_STEPS = 60, 12
RARE = [
    "loop.evaluate_every_epochs=1.0e+9", "loop.checkpoint_every_steps=1000000000", "loop.log_every_steps=10",
    "runtime.compile=false",
]  # fmt: skip
QUICK_BATCH = ["loop.global_batch_size=8", "loop.batch_size=8"]
LABELS = {
    "all": "all labels: 12,298 of 958 characters",
    "two_faces": "2,050 labels: two faces of 958 characters",
    "few": "500 labels: two faces of 250 characters",
}
DEFAULTS = {
    "arms": "resnet18,convnext,fcmae", "labels": "all,two_faces,few", "minutes": "1,2.5,5,10,20,40", "seeds": "3",
    "out": "outputs/bench/when_to_pretrain",
}  # fmt: skip
TITLES = {
    "resnet18": "ResNet-18 from scratch (train.py)",
    "convnext": "ConvNeXt V2 from scratch",
    "fcmae": "FCMAE, then fine-tuning",
}


class Arm(NamedTuple):
    """A way to train: the command with labels, the one without, and its share of the time.

    timed: the name of the training's seconds in speeds.json; arms that share it have equal steps. warmup: share of the
    steps of each, where the schedule has one.
    """

    train: str
    timed: str
    pretrain: str | None = None
    share: float = 0.0
    warmup: float | None = None


GLYPHS = "finetune.py experiment=glyphs/demo_finetune"
PRETRAIN = "pretrain_fcmae.py experiment=glyphs/demo_pretrain task.probe.every_epochs=null"
ARMS = {
    "resnet18": Arm(
        "train.py augment=train_glyphs lr_finder.enabled=false optim.lr=0.2 tracking.live_plots=false", "resnet18"
    ),
    "convnext": Arm(f"{GLYPHS} task.head=drawn", "convnext", warmup=0.1),
    "fcmae": Arm(GLYPHS, "convnext", PRETRAIN, share=0.5, warmup=0.1),
}
SCRATCH = ("resnet18", "convnext")


def make_few(collection, folder):
    """Link the images of `few` as class folders: two faces of the first characters that both have, and STIX."""
    if (folder / "complete").exists():
        return folder
    found = {}
    for split in ("train", "val"):
        for number in collection.rows(split):
            row = collection.row(int(number))
            if row.label is not None and (split == "val" or row.path.split("/")[1] in FACES):
                found.setdefault(row.label, {"train": [], "val": []})[split].append(int(number))
    classes = [name for name in sorted(found) if len(found[name]["train"]) == len(FACES) and found[name]["val"]]
    for name in classes[:FEW_CLASSES]:
        for split, rows in found[name].items():
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in rows:
                link = place / f"{number}.png"
                link.unlink(missing_ok=True)
                link.symlink_to(collection.absolute_path(number).resolve())
    (folder / "complete").touch()
    return folder


def run_script(words, folder, steps, seed, more=()):
    """Run a training into a folder, unless it is complete there."""
    if not is_complete(folder):
        script, *overrides = words.split()
        own = [f"run_dir={folder}", f"loop.total_steps={steps}", f"seed={seed}", *RARE, *more]
        run_command([sys.executable, script, *overrides, *own], log_of(folder))
        shutil.rmtree(folder / "checkpoints")


def sec_per_step(folder):
    """Return the median seconds of a step over a run's rows of figures, without the first, which starts up."""
    windows = step_windows(folder)
    return median(seconds / steps for steps, seconds in windows[1:] or windows)


class Bench:
    """All arms, label sets, budgets and seeds of one folder."""

    def __init__(self, values, quick):
        self.quick, self.out = quick, ROOT / values["out"] / ("quick" if quick else "")
        self.batch = QUICK_BATCH if quick else []
        self.arms, self.labels = values["arms"].split(","), values["labels"].split(",")
        self.minutes = [read_number("minutes", text, float) for text in values["minutes"].split(",")]
        self.seeds = range(read_number("seeds", values["seeds"], int))
        for key, given, known in (("arms", self.arms, ARMS), ("labels", self.labels, LABELS)):
            if wrong := [name for name in given if name not in known]:
                fail(f"{key}: {wrong[0]!r} is not one of {', '.join(known)}")
        collection = load_collection(read_group(DataConfig, "data", "glyphs"))
        self.few = make_few(collection, self.out / "few")

    def words_of(self, labels):
        """Return what selects the labels."""
        if labels == "few":
            return ["data=image_folder", f"data.root={self.few}"]
        faces = ",".join(f'"images/{face}/*"' for face in FACES)
        return ["data=glyphs", *([f"loop.train_paths=[{faces}]"] if labels == "two_faces" else [])]

    def pretrain(self, arm, name, steps, seed):
        """Pretrain where it is not done; returns the folder. Label sets share it."""
        folder = self.out / "runs" / name
        run_script(ARMS[arm].pretrain, folder, steps, seed, [*self.warmup(arm, steps), *self.batch])
        return folder

    def warmup(self, arm, steps):
        """Return the override of the warm-up."""
        share = ARMS[arm].warmup
        return [] if share is None else [f"schedule.warmup_steps={round(share * steps)}"]

    def speeds(self):
        """Return the seconds of a step by the names of Arm.timed and pretrain_<arm>; measured once, in turns."""
        file = self.out / "speeds.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        wanted = {f"pretrain_{arm}": arm for arm in self.arms if ARMS[arm].pretrain}
        for arm in self.arms:
            wanted.setdefault(ARMS[arm].timed, arm)
        missing = {name: arm for name, arm in wanted.items() if name not in known}
        turns = [
            {name: self.measure(name, arm, turn) for name, arm in missing.items()}
            for turn in range(1 if self.quick else 2)
        ]
        known |= {name: min(turn[name] for turn in turns) for name in missing}
        file.write_text(json.dumps(known, indent=2) + "\n")
        return known

    def measure(self, name, arm, turn):
        """Return the seconds of a step of an arm's pretraining, if the name is that, or of its training."""
        steps = QUICK_STEPS if self.quick else CALIBRATION_STEPS
        if name.startswith("pretrain_"):
            return sec_per_step(self.pretrain(arm, f"speed_{name}_{turn}", steps, 0))
        folder = self.out / "runs" / f"speed_{name}_{turn}"
        labels = self.words_of("few" if self.quick else "all")
        run_script(ARMS[arm].train, folder, steps, 0, [*labels, *self.warmup(arm, steps), *self.batch])
        return sec_per_step(folder)

    def run(self, arm, labels, minutes, seed, speeds):
        """Train one arm for its minutes; returns the row of its result."""
        seconds, share = 60 * minutes, ARMS[arm].share
        own = max(1, round(share * seconds / speeds[f"pretrain_{arm}"])) if share else 0
        steps = max(1, round((1 - share) * seconds / speeds[ARMS[arm].timed]))
        if self.quick:
            own, steps = min(own, QUICK_STEPS), QUICK_STEPS
        more = [*self.words_of(labels), *self.warmup(arm, steps), *self.batch]
        if own:
            source = self.pretrain(arm, f"pre_{arm}_{minutes:g}_{seed}", own, seed)
            more.append(f"init_from={source}")
        folder = self.out / "runs" / f"{arm}_{labels}_{minutes:g}_{seed}"
        run_script(ARMS[arm].train, folder, steps, seed, more)
        runtime = json.loads((folder / "environment.json").read_text())["runtime"]
        precision = dict(word.split("=") for word in runtime.split())["precision"]
        found = {"top1": last_top1(folder), "steps": [own, steps], "precision": precision}
        return {"arm": arm, "labels": labels, "minutes": minutes, "seed": seed, **found}

    def run_all(self):
        """Run what results.jsonl lacks, the short budgets first; returns all rows."""
        file, speeds = self.out / "results.jsonl", self.speeds()
        rows = read_rows(file)
        done = {(row["arm"], row["labels"], row["minutes"], row["seed"]) for row in rows}
        for minutes, seed, labels, arm in itertools.product(self.minutes, self.seeds, self.labels, self.arms):
            if (arm, labels, minutes, seed) not in done:
                rows.append(self.run(arm, labels, minutes, seed, speeds))
                with open(file, "a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
        return rows


def summarise(rows):
    """Return (labels, arm) -> minutes -> (mean, least, greatest) of top-1."""
    found = {}
    for row in rows:
        found.setdefault((row["labels"], row["arm"]), {}).setdefault(row["minutes"], []).append(row["top1"])
    return {
        key: {minutes: (mean(values), min(values), max(values)) for minutes, values in sorted(by.items())}
        for key, by in found.items()
    }


def table(found, labels, arms, minutes):
    """Return a Markdown table for each set of labels; the best of a column is bold."""
    lines = []
    for name in labels:
        lines += ["", f"{LABELS[name]}:", "", "| arm | " + " | ".join(f"{m:g} min" for m in minutes) + " |"]
        lines.append("|---|" + "---|" * len(minutes))
        best = {m: max((found[name, arm][m][0] for arm in arms if m in found.get((name, arm), {})), default=None)
                for m in minutes}  # fmt: skip
        for arm in arms:
            cells = []
            for m in minutes:
                values = found.get((name, arm), {}).get(m)
                text = "" if values is None else f"{values[0]:.3f}"
                text = f"**{text}**" if values and values[0] == best[m] else text
                cells.append(
                    f"{text} ({values[1]:.3f} to {values[2]:.3f})" if values and values[1] < values[2] else text
                )
            lines.append(f"| {TITLES[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def main():
    values, quick = read_settings(**DEFAULTS)
    bench = Bench(values, quick)
    found = summarise(bench.run_all())
    text = table(found, bench.labels, bench.arms, bench.minutes)
    (bench.out / "table.md").write_text(text + "\n")
    sys.stdout.write(f"{text}\n\n{bench.out / 'table.md'}\n")


if __name__ == "__main__":
    main()
