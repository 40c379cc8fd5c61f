"""The demo: the whole main job on the embedded glyphs, by the commands that a user types.

python bench/demo.py            (`make demo`)

Draws the glyphs, pretrains, fine-tunes, evaluates on a typeface never trained on, exports, predicts; ends with a table,
outputs/demo/summary.json and the paths of its pictures. An earlier outputs/demo is replaced.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("outputs/demo")

STAGES = {
    "glyphs": ["prepare.py", "job=glyphs"],
    "pretrain": ["pretrain_fcmae.py", "experiment=glyphs/demo_pretrain", f"run_dir={OUT}/pretrain"],
    "finetune": [
        "finetune.py", "experiment=glyphs/demo_finetune", f"init_from={OUT}/pretrain", f"run_dir={OUT}/finetune",
    ],
    "evaluate": ["evaluate.py", f"run_dir={OUT}/finetune", "weights=best"],
    "export": ["export.py", "format=onnx", f"run_dir={OUT}/finetune"],
    "predict": [
        "predict.py", f"weights={OUT}/finetune/export/model.onnx", "input=collections/glyphs/images/STIXGeneral",
        f"output={OUT}/predictions.csv",
    ],
}  # fmt: skip
# Keys that only the full demo fills (its controls need more than the demo's minutes).
CONTROLS = (
    "top1_from_scratch",
    "top1_from_scratch_equal_seconds",
    "top1_few_labels",
    "top1_few_labels_from_scratch_equal_seconds",
)


def run_stage(name, arguments):
    """Run one command, its output passed through; returns its seconds."""
    sys.stderr.write(f"\n== {name}: python {' '.join(arguments)}\n")
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if code != 0:
        sys.exit(f"demo: {name} ended with status {code}; its output above says why")
    return time.perf_counter() - started


def summarise(seconds):
    """Return what the runs found, from their own files."""
    out = ROOT / OUT
    losses = [json.loads(line) for line in (out / "pretrain/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if row["kind"] == "train"]
    metrics = json.loads((out / "finetune/metrics.json").read_text())
    return {
        "pretrain_loss_first": losses[0],
        "pretrain_loss_last": losses[-1],
        "top1": metrics["top1"],
        **dict.fromkeys(CONTROLS),
        "onnx_max_abs_diff": json.loads((out / "finetune/export/export.json").read_text())["onnx_max_abs_diff"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def main():
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    seconds = {name: run_stage(name, arguments) for name, arguments in STAGES.items()}
    summary = summarise(seconds)
    (ROOT / OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = [
        f"pretraining loss      {summary['pretrain_loss_first']:.3f} -> {summary['pretrain_loss_last']:.3f}",
        f"top-1, unseen face    {summary['top1']:.3f}   (958 characters; guessing 0.001, 1-NN on pixels 0.31)",
        f"ONNX against PyTorch  {summary['onnx_max_abs_diff']:.1e}",
        *(f"{name:<21} {value:.0f} s" for name, value in seconds.items()),
        f"{'all stages':<21} {sum(seconds.values()):.0f} s",
        f"pictures              {OUT}/pretrain/plots/reconstructions.png",
        f"                      {OUT}/pretrain/plots/curves.png  {OUT}/finetune/plots/curves.png",
        f"figures               {OUT}/summary.json",
    ]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
