"""Training on a CPU beside other processes: images per second by how idle threads of OpenMP wait, and by threads.

python bench/busy.py [quick]            (on an idle machine; 16 minutes on two cores)

Each figure is a run of a training script on the glyphs, in a process of its own, beside 0, 1 or 2 runs of `train.py` at
the settings that a machine has without us. Prints a table and writes outputs/bench/busy.json.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import OUT
from utils.config.help import ROOT
from utils.record.figures import align_columns

FOLDER = OUT / "busy"
LONG = [
    "loop.total_steps=100000", "loop.evaluate_every_epochs=100000", "loop.log_every_steps=1", "lr_finder.enabled=false",
]  # fmt: skip
SCRIPTS = {
    "train.py, ResNet-18, 32 px": ["train.py", "optim.lr=0.1"],
    "FCMAE, 32 px": ["pretrain_fcmae.py", "experiment=glyphs/demo_pretrain"],
    "fine-tuning ConvNeXt V2, 32 px": ["finetune.py", "experiment=glyphs/demo_finetune", "init_from=null"],
    "ConvNeXt V2 atto, 128 px": [
        "train.py",
        "model=convnextv2_atto",
        "augment.image_size_hw=[128,128]",
        "optim.lr=0.1",
    ],
}
SETTINGS = {
    "as it is": ({}, []),
    "PASSIVE": ({"OMP_WAIT_POLICY": "PASSIVE"}, []),
    "one thread less": ({}, [f"runtime.threads={max(1, (os.cpu_count() or 2) - 1)}"]),
    "one less, PASSIVE": ({"OMP_WAIT_POLICY": "PASSIVE"}, [f"runtime.threads={max(1, (os.cpu_count() or 2) - 1)}"]),
}
OTHERS = (0, 1, 2)


def start(words, name, settings=({}, [])):
    """Start a script in a process of its own; returns it and the file of its figures."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    own = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment, more = settings
    command = [sys.executable, *words, *LONG, *more, f"run_dir={folder}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=own | environment, **quiet), folder / "metrics.jsonl"


def measure(process, file, seconds):
    """Return the images per second of the second half of a time, or of six steps if it has fewer."""
    found, until = [], None
    while until is None or time.monotonic() < until or len(found) < 6:
        if process.poll() is not None:
            raise SystemExit(f"{process.args} has ended")
        time.sleep(0.2)
        with suppress(OSError, ValueError):
            found = [json.loads(line) for line in file.read_text().splitlines()]
        if until is None and found:
            until = time.monotonic() + seconds
    rows = found[len(found) // 2 :]
    size = json.loads((file.parent / "config.json").read_text())["loop"]["global_batch_size"]
    return size * (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])


def main():
    """Measure all settings."""
    quick, rows, neighbour = "quick" in sys.argv[1:], [], SCRIPTS["train.py, ResNet-18, 32 px"]
    seconds = 1.0 if quick else 7.0
    for name, words in list(SCRIPTS.items())[: 1 if quick else None]:
        for others in OTHERS[:2] if quick else OTHERS:
            with ExitStack() as stack:
                for number in range(others):
                    process, _ = start(neighbour, f"neighbour{number}")
                    stack.callback(process.kill)
                time.sleep(10 * others)  # until they train
                figures = {}
                for setting, values in list(SETTINGS.items())[: 2 if quick else None]:
                    process, file = start(words, "measured", values)
                    stack.callback(process.kill)
                    figures[setting] = measure(process, file, seconds)
                    process.kill()
                    process.wait()
            rows.append({"script": name, "others": others, "images_per_sec": figures})
            first = figures["as it is"]
            shown = [f"{value:,.0f} ({value / first:.2f})" for value in figures.values()]
            print(align_columns([("script", "others", *figures), (name, str(others), *shown)]), flush=True)
    file = OUT / ("quick/busy.json" if quick else "busy.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
