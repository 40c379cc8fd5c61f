"""The demo of the tagger: from pictures with words to a model.onnx that programs for taggers read.

python bench/demo_tagger.py [out=FOLDER] [KEY=VALUE ...]      (`make demo-tagger`; values go to all trainings)

Trains a ResNet-18 from scratch (train.py task=tagging) on the words in the names of one typeface's characters,
calibrates, exports to wd14, and predicts by ONNX Runtime. Beside it: FCMAE on all glyphs without labels, then
fine-tuning; a plain loop of timm with a ResNet-18 for the same seconds on the same images (bench/timm_tagger.py); and
the same training without the orientation map. All are measured on a typeface never seen. Two run at a time, each on
half of the cores.
"""

import csv
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.commands import ROOT, log_of, read_rows, rows_of
from bench.demo import begin, finish, run_stage
from utils.text_table import align_columns

FACE = "images/DejaVuSans/*"
COLOURS = ("model.in_channels=3", "augment.mean=[0.5,0.5,0.5]", "augment.std=[0.5,0.5,0.5]", "augment.pad=square")
# About 130 seconds of one core each: 0.18 s a step of pretraining, 0.5 s of fine-tuning, 0.7 s of ResNet-18.
PRETRAIN = ("loop.total_steps=300", "schedule.warmup_steps=30", "loop.evaluate_every_epochs=100",
            "task.probe.every_epochs=null")  # fmt: skip
FINETUNE = ("loop.total_steps=145", "schedule.warmup_steps=14")
TRAIN = (
    "train.py", "task=tagging", "augment=tagger", "augment.image_size_hw=[32,32]",
    "augment.affine={degrees:8.0,translate:0.08,scale:[0.8,1.1],shear_degrees:10.0}", "loop.total_steps=184",
    "loop.evaluate_every_epochs=100", "lr_finder.enabled=false", "optim=muon", "optim.lr=6.0e-3",
    "+optim.extra.ns_steps=3", "schedule=cosine", "schedule.warmup_steps=18", "loop.clip_grad_norm=1.0",
    "runtime.compile=false", "tracking.live_plots=false",
)  # fmt: skip


@contextmanager
def beside(name, out, *command):
    """Run a command while the block runs, its output into a file; the demo ends where it fails."""
    log = log_of(ROOT / out / name)
    sys.stderr.write(f"\n== {name}, beside the next: python {' '.join(command)} > {log}\n")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as stream:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield
        if process.wait():
            sys.exit(f"demo: {name} ended with status {process.returncode}; {log} says why")
    finally:
        process.kill()
        process.wait()


def sided_ap(folder):
    """Return the mean AP of the tags that a mirror exchanges, and their number."""
    with open(ROOT / folder / "tables/tags.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["tag"].startswith(("left", "right")) and row["ap"]]
    return sum(float(row["ap"]) for row in rows) / len(rows), len(rows)


def run(out, overrides):
    """Run all stages; returns their figures."""
    threads = [text.partition("=")[2] for text in overrides if text.startswith("runtime.threads=")][-1]
    seconds, vocabulary = {}, f"{out}/selected_tags.csv"

    def words(name, *arguments):
        return [*arguments, f"run_dir={out}/{name}", f"task.vocabulary={vocabulary}",
                f'loop.train_paths=["{FACE}"]', *overrides]  # fmt: skip

    def stage(name, *words):
        seconds[name] = run_stage(name, list(words))

    stage("glyphs", "prepare.py", "job=glyphs")
    stage("vocabulary", "prepare.py", "job=vocabulary", f"vocabulary.output={vocabulary}")
    with beside("tagger", out, *words("tagger", *TRAIN, "task.orientation=glyphs")):
        stage("pretrain", "pretrain_fcmae.py", "experiment=glyphs/demo_pretrain", f"run_dir={out}/pretrain", *COLOURS,
              *PRETRAIN, *overrides)  # fmt: skip
        fcmae = ("finetune.py", "experiment=glyphs/tagger", f"init_from={out}/pretrain")
        stage("finetune", *words("finetune", *fcmae, *FINETUNE))
    spent = {name: rows_of(ROOT / out / name, "epoch")[-1]["seconds"] for name in ("tagger", "pretrain", "finetune")}
    rival = ["bench/timm_tagger.py", f"vocabulary={vocabulary}", f"out={out}/timm.json", f"paths={FACE}",
             f"seconds={spent['tagger']:.0f}", f"threads={threads}"]  # fmt: skip
    with beside("timm", out, *rival):
        stage("no_map", *words("no_map", *TRAIN, "task.orientation=null"))
    stage("evaluate", "evaluate.py", f"run_dir={out}/tagger", "weights=last", "calibrate=true")
    stage("export", "export.py", "format=wd14", f"run_dir={out}/tagger", "weights=last")
    stage("predict", "predict.py", f"weights={out}/tagger/export/wd14/model.onnx",
          "input=collections/glyphs/images/STIXGeneral", f"output={out}/predictions.jsonl")  # fmt: skip
    spent = {"tagger": spent["tagger"], "fcmae": spent["pretrain"] + spent["finetune"]}
    return {"seconds": seconds, "training_seconds": spent}


def collect(out):
    """Return the figures that the runs left in their files."""
    last = {name: rows_of(ROOT / out / name, "evaluate")[-1] for name in ("tagger", "finetune", "no_map")}
    timm = json.loads((ROOT / out / "timm.json").read_text())
    figures = {name: {key: row[key] for key in ("mAP", "macro_f1")} for name, row in last.items()}
    figures["timm_resnet18"] = {key: timm[key] for key in ("mAP", "macro_f1")}
    figures["frequency"] = {key: timm[f"frequency_{key}"] for key in ("mAP", "macro_f1")}
    sided, number = sided_ap(f"{out}/tagger")
    return {**figures, "sided_tags": number, "sided_ap": sided, "sided_ap_no_map": sided_ap(f"{out}/no_map")[0]}


def table(found, out):
    """Return the closing table."""
    titles = {
        "tagger": "train.py: ResNet-18 from scratch", "timm_resnet18": "timm's ResNet-18, plain loop",
        "finetune": f"FCMAE, then fine-tuning ({found['training_seconds']['fcmae']:.0f} s)",
        "frequency": "the tags' frequencies",
    }  # fmt: skip
    rows = [(f"unseen typeface, {found['training_seconds']['tagger']:.0f} s of training", "mAP", "macro F1 at P = R")]
    rows += [(text, *(f"{found[name][key]:.3f}" for key in ("mAP", "macro_f1"))) for name, text in titles.items()]
    rows.append((f"mean AP of {found['sided_tags']} left and right tags", f"{found['sided_ap']:.3f}", "with the map"))
    rows.append(("", f"{found['sided_ap_no_map']:.3f}", "without it, not mirrored"))
    example = next(row for row in read_rows(ROOT / out / "predictions.jsonl") if row.get("tags"))
    lines = [align_columns(rows), "", f"{Path(example['path']).name}: {example['tags']}", ""]
    lines += [f"{name:<12} {value:.0f} s" for name, value in found["seconds"].items()]
    lines.append(f"all stages   {sum(found['seconds'].values()):.0f} s")
    lines += [f"picture      {out}/tagger/plots/{name}.png" for name in ("curves", "pr_curves", "mistakes")]
    lines.append(f"for ComfyUI, sd-scripts, imgutils: {out}/tagger/export/wd14")
    return "\n".join(lines)


def main():
    _, out, arguments = begin(["out=outputs/demo_tagger", *sys.argv[1:]])
    found = run(out, [f"{key}={value}" for key, value in arguments.items()]) | collect(out)
    finish(out, found, table(found, out))


if __name__ == "__main__":
    main()
