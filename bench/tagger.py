"""The whole loop of a tagger against the plain loop of timm and torchmetrics: speed, evaluation, memory, and figures.

python bench/tagger.py [quick] [seconds=60] [turns=3]      (on an idle machine; six minutes on two cores)

Both train timm's ResNet-18 on the glyphs' words at 32 px in batches of 128 on all cores, with the same crops and turns,
in turns. Ours is train.py task=tagging, for as many steps as the rival made in its seconds; its evaluation includes
tables, pictures and every figure, the rival's exact mAP alone.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.commands import ROOT, log_of, read_number, read_settings, rows_of, run_command
from utils.text_table import align_columns

PYTHON = sys.executable
ROWS = {
    "images_per_sec": "images/s of the training loop", "evaluation_seconds": "seconds of an evaluation",
    "peak_memory_gib": "peak memory, GiB", "mAP": "mAP after as many steps", "macro_f1": "macro F1 at P = R",
}  # fmt: skip


def theirs(out, turn, seconds):
    """Run the plain loop; returns its figures."""
    file = out / f"timm-{turn}.json"
    command = [PYTHON, "bench/timm_tagger.py", f"vocabulary={out}/tags.csv", f"out={file}", f"seconds={seconds}"]
    run_command(command, log_of(out / f"timm-{turn}"))
    return json.loads(file.read_text())


def ours(out, turn, steps):
    """Run train.py for some steps, then evaluate.py; returns the same figures."""
    folder = out / f"ours-{turn}"
    run_command([PYTHON, "train.py", "task=tagging", f"task.vocabulary={out}/tags.csv", "task.orientation=null",
                 "augment.image_size_hw=[32,32]", "augment.interpolation=bicubic", "optim=adamw", "optim.lr=0.002",
                 "augment.affine={degrees: 8.0, translate: 0.08, scale: [0.8, 1.1], shear_degrees: 10.0}",
                 "lr_finder.enabled=false", "loop.clip_grad_norm=1.0", f"loop.total_steps={steps}",
                 "loop.evaluate_every_epochs=1000", "tracking.live_plots=false", f"run_dir={folder}"],
                log_of(folder))  # fmt: skip
    log = log_of(out / f"evaluate-{turn}")
    run_command([PYTHON, "evaluate.py", f"run_dir={folder}", "weights=last"], log)
    row, measured = rows_of(folder, "epoch")[-1], json.loads((folder / "metrics.json").read_text())
    return {**measured, **{key: row[key] for key in ("images_per_sec", "peak_memory_gib")},
            "evaluation_seconds": measured["seconds"]}  # fmt: skip


def main():
    given, quick = read_settings(seconds="60", turns="3")
    seconds, turns = read_number("seconds", given["seconds"], float), read_number("turns", given["turns"], int)
    out = ROOT / "outputs/bench" / ("quick/tagger" if quick else "tagger")
    out.mkdir(parents=True, exist_ok=True)
    run_command([PYTHON, "prepare.py", "job=vocabulary", f"vocabulary.output={out}/tags.csv"], log_of(out / "prepare"))
    found = {"ours": [], "theirs": []}
    for turn in range(1 if quick else turns):
        found["theirs"].append(theirs(out, turn, 5 if quick else seconds))
        found["ours"].append(ours(out, turn, found["theirs"][-1]["steps"]))
    table = [("", "ours", "timm and torchmetrics", "ratio (least to greatest)")]
    for key, title in ROWS.items():
        pairs = [(one[key], other[key]) for one, other in zip(found["ours"], found["theirs"])]
        middle = [statistics.median(side) for side in zip(*pairs)]
        ratios = sorted(one / max(other, 1e-9) for one, other in pairs)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        table.append((title, *(f"{value:.4g}" for value in middle), spread))
    (out / "tagger.json").write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"{align_columns(table)}\n{(out / 'tagger.json').relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
