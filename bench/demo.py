"""The demo: the whole main job on the embedded glyphs, by the commands that a user types.

python bench/demo.py [full] [out=FOLDER] [KEY=VALUE ...]     (`make demo`, `make demo-full`; values go to all trainings)

Draws the glyphs, pretrains on all of them without labels and fine-tunes with the labels of one typeface; meanwhile
trains train.py's ResNet-18 with the same labels; evaluates on a typeface never trained on, exports, predicts. It ends
with a table, outputs/demo/summary.json and the paths of its pictures. `full` also runs both with all labels, and the
same ConvNeXt V2 from scratch. An earlier demo in the same folder is replaced; a folder that holds anything else is
refused.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.commands import ROOT, last_top1, log_of, rows_of
from utils.ranks.processes import count_cores

USAGE = "python bench/demo.py [full] [out=FOLDER] [KEY=VALUE ...]"
ONE_FACE = ('loop.train_paths=["images/DejaVuSans/*"]', "loop.evaluate_every_epochs=14")
# About 250 seconds of one core each: 0.145 s a step of pretraining, 0.315 s of fine-tuning, 0.315 s of ResNet-18.
SCRATCH = ("task.head=drawn", "loop.total_steps=800", "schedule.warmup_steps=80")
RESNET18 = (
    "lr_finder.enabled=false", "optim.lr=0.2", "loop.total_steps=800", "runtime.compile=false",
    "tracking.live_plots=false",
)  # fmt: skip
# Keys of the summary that only the full demo has.
CONTROLS = {
    "top1_from_scratch": "labels of one face: the same ConvNeXt V2 from scratch",
    "top1_all_labels": "all labels: FCMAE, then fine-tuning",
    "top1_all_labels_resnet18": "all labels: ResNet-18 from scratch (train.py)",
}


def run_stage(name, arguments):
    """Run one command, its output passed through; returns its seconds."""
    sys.stderr.write(f"\n== {name}: python {' '.join(arguments)}\n")
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if code != 0:
        sys.exit(f"demo: {name} ended with status {code}; its output above says why")
    return round(time.perf_counter() - started, 1)


class Demo:
    """The stages of one demo in folder `out`; `overrides` go to what trains. `seconds` are filled as they run.

    Two trainings run at a time, so that both see the same machine, each with half of its cores.
    """

    def __init__(self, out, overrides):
        self.out, self.overrides = out, overrides
        self.seconds = {}
        self._beside = None  # name and process of a training that runs meanwhile

    def run(self, name, *arguments):
        """Run a stage and note its seconds; ends the demo where what runs beside it has failed."""
        if self._beside is not None:
            other, process = self._beside
            self._check(other, process.poll())
        self.seconds[name] = run_stage(name, list(arguments))

    def _check(self, name, code):
        """End the demo where a training beside others has failed; code None: it goes on."""
        if code:
            sys.exit(f"demo: {name} ended with status {code}; {log_of(ROOT / self.out / name)} says why")

    @contextmanager
    def beside_resnet18(self, name, *arguments):
        """Train ResNet-18 from scratch while the block runs, at a rate that a range test could have found.

        Into the folder of that name, its output into a file beside the folder.
        """
        command = ["train.py", f"run_dir={self.out}/{name}", *RESNET18, *arguments, *self.overrides]
        log = log_of(ROOT / self.out / name)
        sys.stderr.write(f"\n== {name}, beside the next: python {' '.join(command)} > {log}\n")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as stream:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
            self._beside = name, process
            try:
                yield
                started = time.perf_counter()
                code = process.wait()
            finally:
                self._beside = None
                process.kill()
                process.wait()
        self.seconds[f"wait_for_{name}"] = round(time.perf_counter() - started, 1)
        self._check(name, code)

    def finetune(self, name, *arguments):
        """Fine-tune into the folder of that name."""
        self.run(
            name, "finetune.py", "experiment=glyphs/demo_finetune", f"run_dir={self.out}/{name}", *arguments,
            *self.overrides,
        )  # fmt: skip

    def read(self, name):
        """Return a JSON file of the demo's folder."""
        return json.loads((ROOT / self.out / name).read_text())

    def training_seconds(self, *runs):
        """Return the seconds of the steps of some runs, their evaluations and start-up not counted."""
        return round(sum(rows_of(ROOT / self.out / run, "epoch")[-1]["seconds"] for run in runs), 1)

    def main_line(self):
        """Run what `make demo` shows."""
        self.run("glyphs", "prepare.py", "job=glyphs")
        with self.beside_resnet18("resnet18", *ONE_FACE):
            self.run(
                "pretrain", "pretrain_fcmae.py", "experiment=glyphs/demo_pretrain", f"run_dir={self.out}/pretrain",
                *self.overrides,
            )  # fmt: skip
            self.finetune("finetune", f"init_from={self.out}/pretrain", *ONE_FACE)
        self.run("evaluate", "evaluate.py", f"run_dir={self.out}/finetune", "weights=last")
        self.run("export", "export.py", "format=onnx", f"run_dir={self.out}/finetune", "weights=last")
        self.run(
            "predict", "predict.py", f"weights={self.out}/finetune/export/model.onnx",
            "input=collections/glyphs/images/STIXGeneral", f"output={self.out}/predictions.csv",
        )  # fmt: skip

    def controls(self):
        """Run the controls; returns what they reached."""
        with self.beside_resnet18("all_labels_resnet18"):
            self.finetune("all_labels", f"init_from={self.out}/pretrain")
            self.finetune("scratch", *SCRATCH, *ONE_FACE)
        runs = ("scratch", "all_labels", "all_labels_resnet18")
        return dict(zip(CONTROLS, (last_top1(ROOT / self.out / run) for run in runs)))

    def summary(self, controls):
        """Return what the runs found, from their own files."""
        losses = [row["loss"] for row in rows_of(ROOT / self.out / "pretrain", "train")]
        return {
            "pretrain_loss_first": losses[0],
            "pretrain_loss_last": losses[-1],
            "top1": self.read("finetune/metrics.json")["top1"],
            "top1_resnet18": last_top1(ROOT / self.out / "resnet18"),
            "training_seconds": self.training_seconds("pretrain", "finetune"),
            "training_seconds_resnet18": self.training_seconds("resnet18"),
            **controls,
            "onnx_max_abs_diff": self.read("finetune/export/export.json")["model.onnx"]["onnx_max_abs_diff"],
            "seconds": self.seconds,
        }

    def pictures(self):
        """Return the pictures of the main line, relative to the repository."""
        names = ("pretrain/plots/curves", "pretrain/plots/reconstructions", "finetune/plots/curves",
                 "finetune/plots/evaluate_confusion", "finetune/plots/evaluate_mistakes")  # fmt: skip
        paths = [Path(self.out) / f"{name}.png" for name in names]
        missing = [str(path) for path in paths if not (ROOT / path).is_file()]
        if missing:
            sys.exit(f"demo: no picture was made at {', '.join(missing)}")
        return paths


def table(summary, pictures, out):
    """Return the closing table."""

    def figure(top1, seconds):
        return f"{summary[top1]:.3f}   in {summary[seconds]:.0f} s of training"

    lines = [
        ("pretraining loss", f"{summary['pretrain_loss_first']:.3f} -> {summary['pretrain_loss_last']:.3f}"),
        ("top-1 on an unseen typeface, 958 characters", "(guessing 0.001; 1-NN on pixels, all labels, 0.31)"),
        ("  labels of one face: FCMAE, then fine-tuning", figure("top1", "training_seconds")),
        ("  ResNet-18 from scratch (train.py)", figure("top1_resnet18", "training_seconds_resnet18")),
    ]
    lines += [(f"  {title}", f"{summary[name]:.3f}") for name, title in CONTROLS.items() if name in summary]
    lines.append(("ONNX against PyTorch", f"{summary['onnx_max_abs_diff']:.1e}"))
    lines += [(f"  {name}", f"{value:.0f} s") for name, value in summary["seconds"].items()]
    lines.append(("all stages", f"{sum(summary['seconds'].values()):.0f} s"))
    lines += [("picture", path) for path in pictures]
    lines.append(("figures", f"{out}/summary.json"))
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"{title:<{width}}  {text}" for title, text in lines)


def read_arguments(words):
    """Return (full, out, the values for all trainings) of the command line."""
    if wrong := [word for word in words if word != "full" and "=" not in word]:
        sys.exit(f"demo: {wrong[0]!r} is neither full nor KEY=VALUE; usage: {USAGE}")
    arguments = dict(word.split("=", 1) for word in words if word != "full")
    return "full" in words, arguments.pop("out", "outputs/demo"), arguments


def clear(out):
    """Empty the folder of an earlier demo; any other that is not empty is left alone, and ends this one."""
    folder = ROOT / out
    if not folder.exists():
        return
    there = list(folder.iterdir()) if folder.is_dir() else [folder]
    known = ("resnet18.log", "pretrain/config.json", "shapes/black_0.png", "summary.json")
    if there and not any((folder / name).is_file() for name in known):
        sys.exit(f"demo: out={out} holds other things than an earlier demo ({folder.resolve()}); name another folder")
    for path in there:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def begin(words):
    """Read the command line and empty the demo's folder; returns what `read_arguments` does, with half of the cores."""
    full, out, arguments = read_arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no training is left behind
    clear(out)
    arguments.setdefault("runtime.threads", max(1, count_cores() // 2))
    return full, out, arguments


def finish(out, summary, text):
    """Write the figures into the demo's folder, and its table on the screen."""
    (ROOT / out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    sys.stdout.write(f"\n{text}\n")


def main():
    full, out, arguments = begin(sys.argv[1:])
    demo = Demo(out, [f"{key}={value}" for key, value in arguments.items()])
    demo.main_line()
    summary = demo.summary(demo.controls() if full else {})
    finish(out, summary, table(summary, demo.pictures(), out))


if __name__ == "__main__":
    main()
