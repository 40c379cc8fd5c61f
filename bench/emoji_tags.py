"""Emoji with keywords: taggers trained on five drawing styles and judged on a sixth, after equal seconds of one core.

python bench/emoji_tags.py [packages=FOLDER] [arms=fcmae,scratch,train,timm] [seconds=180] [quick]

packages: a folder of files of `npm pack`; npm fetches those that are absent (15 MB). resvg-py (`pip install resvg-py`)
draws the icons, once. quick: a few steps on a few emoji, and nothing where a package or resvg-py is absent.

| arm | what trains for `seconds` |
|---|---|
| fcmae | FCMAE on the images of the five styles for a third of the seconds, then fine-tuning of its encoder |
| scratch | the same network by the same recipe without pretraining |
| train | `train.py task=tagging` with its ResNet-18 and its defaults |
| distilled | the network of `scratch`, taught by labels and by the last weights of `train`, whose seconds come on top |
| timm | the plain loop of bench/timm_tagger.py with timm's resnet18 |

All have the same images of 48 px, tags, crops, turns and precision, and batches of 128 (64 in FCMAE); none mirrors. The
last weights are judged. Seconds are CPU seconds of one thread, so other work on the machine takes none of them. They
are those of the training steps, with reading and augmenting. Of a command of ours they are what it takes beyond its
fixed part, start and evaluation, which two short runs tell apart. `frequency` gives all images the tags' frequencies.
"""

import json
import re
import resource
import shutil
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.commands import ROOT, fail, log_of, read_number, read_settings, rows_of, run_command
from bench.measure import describe_machine
from utils.hardware import has_fast_bf16
from utils.text_table import align_columns

TRAIN = {"noto": "1.2.9", "noto-v1": "1.2.5", "twemoji": "1.2.5", "openmoji": "1.2.29", "emojione": "1.2.3"}
VAL = {"fluent-emoji-flat": "1.2.6"}
PACKAGES = {style: f"@iconify-json/{style}@{version}" for style, version in {**TRAIN, **VAL}.items()}
KEYWORDS = "emojibase-data@17.0.0"
LEFT_OUT = ("component", "flags")  # few of the styles have flags
DRAWN_PX, SIZE_PX, MIN_COUNT = 96, 48, 50
PRETRAINING_SHARE, QUICK_STEPS, QUICK_EMOJI = 1 / 3, 4, 100
SHORT, LONG = 4, 24  # steps of the runs that tell the seconds of a step
PRECISION = "bf16" if has_fast_bf16("cpu") else "fp32"
OURS = [
    "data=image_folder", f"augment.image_size_hw=[{SIZE_PX},{SIZE_PX}]", "augment.interpolation=bicubic",
    "augment.affine={degrees:8.0,translate:0.08,scale:[0.8,1.1],shear_degrees:10.0}",
    "loop.evaluate_every_epochs=1.0e+9", "loop.checkpoint_every_steps=1000000000", f"runtime.precision={PRECISION}",
    "runtime.device=cpu", "runtime.threads=1", "runtime.workers=0", "runtime.compile=false",
]  # fmt: skip
# As in experiment=glyphs/demo_pretrain and glyphs/tagger, which were found on other images.
CONVNEXT = [
    "model=convnextv2_glyph", "model.depths=[1,1,4]", "optim=muon", "loop.clip_grad_norm=1.0", "loop.batch_size=64",
]  # fmt: skip
TAGGING = ["task=tagging", "task.orientation=null", "loop.global_batch_size=128"]
KINDS = {
    "pretrain": [
        "pretrain_fcmae.py", *CONVNEXT, "augment=tagger", "augment.crop_scale=[0.7,1.0]", "optim.lr=3.0e-3",
        "loop.global_batch_size=64", "task.decoder_dim=128", "task.probe.every_epochs=null",
    ],
    "finetune": ["finetune.py", *CONVNEXT, *TAGGING, "optim.lr=6.0e-3"],
    "train": ["train.py", *TAGGING, "tracking.live_plots=false"],
    "distil": [
        "finetune.py", *CONVNEXT, "task=distillation", "task.orientation=null", "task.label_share=0.5",
        "loop.global_batch_size=128", "optim.lr=6.0e-3",
    ],
}  # fmt: skip
ARMS = {
    "fcmae": ("pretrain", "finetune"), "scratch": ("finetune",), "train": ("train",), "distilled": ("distil",),
    "timm": (),
}  # fmt: skip
FIGURES = ("mAP", "macro_f1")


# --------------------------------------------------------------------------------------------------------- collection


def shorten(code):
    """Return code points without joiners and selectors, which packages write differently."""
    return "-".join(part for part in code.lower().split("-") if part not in ("200d", "fe0f"))


def draw(icon):
    """Return the PNG file of an icon, on white."""
    from resvg_py import svg_to_bytes  # needed once, and not among the requirements

    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
    svg = f'<svg {names} width="{DRAWN_PX}" height="{DRAWN_PX}" viewBox="{box}">{icon["body"]}</svg>'
    return bytes(svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))


class Packages:
    """The files of `npm pack` in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, package):
        """Return the file of a package, as npm names it."""
        return self.folder / f"{re.sub('[@/]+', '-', package).strip('-')}.tgz"

    def missing(self):
        """Return the packages that are absent."""
        return [package for package in (*PACKAGES.values(), KEYWORDS) if not self.path(package).exists()]

    def fetch(self):
        """Fetch the packages that are absent."""
        if missing := self.missing():
            if shutil.which("npm") is None:
                fail(f"packages: {self.folder} lacks {', '.join(missing)}, and there is no npm to fetch them")
            self.folder.mkdir(parents=True, exist_ok=True)
            words = ["npm", "pack", "--silent", f"--pack-destination={self.folder}", *missing]
            run_command(words, self.folder / "npm.log")

    def read(self, package, name):
        """Return a JSON file of a package."""
        with tarfile.open(self.path(package)) as archive:
            return json.load(archive.extractfile(f"package/{name}.json"))

    def tags(self):
        """Return the tags of each emoji by the name of its icon: its group and subgroup, and its keywords."""
        texts = self.read(KEYWORDS, "en/messages")
        groups, subgroups = ({row["order"]: row["key"] for row in texts[key]} for key in ("groups", "subgroups"))
        known = {
            shorten(row["hexcode"]): [groups[row["group"]], subgroups[row["subgroup"]], *row.get("tags", [])]
            for row in self.read(KEYWORDS, "en/data")
            if "group" in row and groups[row["group"]] not in LEFT_OUT
        }
        names = self.read(PACKAGES["twemoji"], "chars")  # which all styles have in common
        return {name: known[short] for code, name in sorted(names.items()) if (short := shorten(code)) in known}

    def write_collection(self, folder, limit):
        """Write train/STYLE/NAME.png and val/STYLE/NAME.png, with .txt files of tags, of the first `limit` emoji."""
        tags = dict(list(self.tags().items())[:limit])
        for split, styles in (("train", TRAIN), ("val", VAL)):
            for style in styles:
                icons, place = self.read(PACKAGES[style], "icons"), folder / split / style
                place.mkdir(parents=True)
                for name in tags.keys() & icons["icons"].keys():
                    (place / f"{name}.png").write_bytes(draw({"left": 0, "top": 0, **icons, **icons["icons"][name]}))
                    (place / f"{name}.txt").write_text(", ".join(tags[name]))


# ----------------------------------------------------------------------------------------------------------- the arms


class Bench:
    """Arms on the collection in `root`, each for the same CPU seconds."""

    def __init__(self, out, root, seconds, quick):
        self.out, self.root, self.seconds, self.quick = out, root, seconds, quick
        self.vocabulary, self.speeds = out / "selected_tags.csv", {}

    def prepare(self):
        """Write the manifest, which timm_tagger.py reads, and the vocabulary."""
        words = [sys.executable, "prepare.py", "data=image_folder", f"data.root={self.root}"]
        run_command([*words, "job=manifest", "verify=false"], self.out / "manifest.log")
        words += ["job=vocabulary", f"vocabulary.output={self.vocabulary}", f"vocabulary.min_count={MIN_COUNT}"]
        run_command(words, self.out / "vocabulary.log")

    def run(self, kind, name, steps, more=()):
        """Run one of our commands; returns its CPU seconds."""
        own = [f"data.root={self.root}", f"run_dir={self.out / name}", f"loop.total_steps={steps}", *more]
        own += [f"task.vocabulary={self.vocabulary}"] if kind in ("finetune", "train") else []
        own += [f"task.teacher={self.out}/train_train/weights/last_weights.safetensors"] if kind == "distil" else []
        own += [] if kind == "train" else [f"schedule.warmup_steps={steps // 10}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_command([sys.executable, *KINDS[kind], *OURS, *own], log_of(self.out / name))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def speed(self, kind):
        """Return the CPU seconds of a run without steps, and those of a step; measured once."""
        if kind not in self.speeds and self.quick:
            self.speeds[kind] = 0.0, self.seconds / QUICK_STEPS
        elif kind not in self.speeds:
            short, long = (self.run(kind, f"speed_{kind}_{steps}", steps) for steps in (SHORT, LONG))
            step = (long - short) / (LONG - SHORT)
            self.speeds[kind] = short - SHORT * step, step
        return self.speeds[kind]

    def ours(self, arm):
        """Return the row of one of our arms."""
        left, more, made = self.seconds, [], []
        for kind in ARMS[arm]:
            fixed, step = self.speed(kind)
            made.append(max(1, round(left * (PRETRAINING_SHARE if kind == "pretrain" else 1) / step)))
            left -= self.run(kind, f"{arm}_{kind}", made[-1], more) - fixed
            more = [f"init_from={self.out / f'{arm}_{kind}'}"]
        last = rows_of(self.out / f"{arm}_{kind}", "evaluate")[-1]
        return {"arm": arm, **{name: last[name] for name in FIGURES}, "seconds": self.seconds - left, "steps": made}

    def timm(self):
        """Return the rows of the frequencies and of timm's arm."""
        words = [f"vocabulary={self.vocabulary}", f"out={self.out / 'timm.json'}", f"data={self.root}", "threads=1"]
        words += [f"size={SIZE_PX}", f"precision={PRECISION}", f"seconds={self.seconds}"]
        run_command([sys.executable, "bench/timm_tagger.py", *words], self.out / "timm.log")
        found = json.loads((self.out / "timm.json").read_text())
        frequency = {"arm": "frequency", **{name: found[f"frequency_{name}"] for name in FIGURES}, "seconds": 0.0}
        figures = {name: found[name] for name in (*FIGURES, "seconds")}
        return [{**frequency, "steps": [0]}, {"arm": "timm", **figures, "steps": [found["steps"]]}]


def table(rows):
    """Return the rows as a table."""
    lines = [("arm", "mAP", "macro F1 at P=R", "CPU seconds", "steps")]
    for row in rows:
        figures = (f"{row['mAP']:.4f}", f"{row['macro_f1']:.4f}", f"{row['seconds']:.0f}")
        lines.append((row["arm"], *figures, " + ".join(map(str, row["steps"]))))
    return align_columns(lines)


def main():
    given, quick = read_settings(packages="outputs/emoji_tags/packages", arms=",".join(ARMS), seconds="180")
    arms, seconds = given["arms"].split(","), 4.0 if quick else read_number("seconds", given["seconds"], float)
    if wrong := [arm for arm in arms if arm not in ARMS]:
        fail(f"arms: {wrong[0]!r} is not one of {', '.join(ARMS)}")
    if "distilled" in arms and "train" not in arms[: arms.index("distilled")]:
        fail("arms: distilled is taught by train; name train before it")
    out = ROOT / "outputs/bench" / ("quick/emoji_tags" if quick else "emoji_tags")
    shutil.rmtree(out, ignore_errors=True)  # of an earlier run
    root, packages = (out if quick else ROOT / "outputs/emoji_tags") / "collection", Packages(ROOT / given["packages"])
    if not root.exists():
        has_drawer = find_spec("resvg_py") is not None
        if quick and not (has_drawer and not packages.missing()):
            sys.stdout.write(f"skipped: resvg-py is absent, or in {packages.folder} {', '.join(packages.missing())}\n")
            return
        if not has_drawer:
            fail("resvg-py, which draws the icons, is not installed; pip install resvg-py")
        packages.fetch()
        packages.write_collection(out / "drawn", QUICK_EMOJI if quick else None)
        (out / "drawn").rename(root)  # whole or absent
    bench = Bench(out, root.relative_to(ROOT), seconds, quick)
    bench.prepare()
    rows = []
    for arm in arms:
        rows += bench.timm() if arm == "timm" else [bench.ours(arm)]
        sys.stderr.write(f"{rows[-1]}\n")
    path = out.with_suffix(".json")
    report = {"machine": describe_machine(torch.device("cpu")), "precision": PRECISION, "quick": quick, "rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"{table(rows)}\n{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
