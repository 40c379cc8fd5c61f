"""The demo: the whole main job on the embedded glyphs, by the commands that a user types.

python bench/demo.py [out=FOLDER] [KEY=VALUE ...]            (`make demo`; the values go to both trainings)

Draws the glyphs, pretrains, fine-tunes, evaluates on a typeface never trained on, exports, predicts; ends with a table,
outputs/demo/summary.json and the paths of its pictures. An earlier demo in the same folder is replaced.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def stages(out, overrides):
    """Return the commands in order; `overrides` go to the two that train."""
    return {
        "glyphs": ["prepare.py", "job=glyphs"],
        "pretrain": [
            "pretrain_fcmae.py", "experiment=glyphs/demo_pretrain", f"run_dir={out}/pretrain", *overrides,
        ],
        "finetune": [
            "finetune.py", "experiment=glyphs/demo_finetune", f"init_from={out}/pretrain", f"run_dir={out}/finetune",
            *overrides,
        ],
        "evaluate": ["evaluate.py", f"run_dir={out}/finetune", "weights=best"],
        "export": ["export.py", "format=onnx", f"run_dir={out}/finetune"],
        "predict": [
            "predict.py", f"weights={out}/finetune/export/model.onnx",
            "input=collections/glyphs/images/STIXGeneral", f"output={out}/predictions.csv",
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


def summarise(out, seconds):
    """Return what the runs found, from their own files."""
    rows = [json.loads(line) for line in (out / "pretrain/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
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
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    out = Path(arguments.pop("out", "outputs/demo"))
    whole = ROOT / out
    shutil.rmtree(whole, ignore_errors=True)
    commands = stages(out, [f"{key}={value}" for key, value in arguments.items()])
    seconds = {name: run_stage(name, words) for name, words in commands.items()}
    summary = summarise(whole, seconds)
    (whole / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = [
        f"pretraining loss      {summary['pretrain_loss_first']:.3f} -> {summary['pretrain_loss_last']:.3f}",
        f"top-1, unseen face    {summary['top1']:.3f}   (958 characters; guessing 0.001, 1-NN on pixels 0.31)",
        f"ONNX against PyTorch  {summary['onnx_max_abs_diff']:.1e}",
        *(f"{name:<21} {value:.0f} s" for name, value in seconds.items()),
        f"{'all stages':<21} {sum(seconds.values()):.0f} s",
        f"pictures              {out}/pretrain/plots/reconstructions.png",
        f"                      {out}/pretrain/plots/curves.png  {out}/finetune/plots/curves.png",
        f"figures               {out}/summary.json",
    ]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
