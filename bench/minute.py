"""What of a minute is training: `train.py loop.minutes=1`, as a user types it.

python bench/minute.py [quick] [rows] [TEXT OF A SETTING]        (a minute a setting, on a GPU)

A setting gives two rows, in milliseconds over a goal. start: from typing to the first update, at most 8 s. other: all
that is not training, at most 15 s. Fashion-MNIST is in outputs/bench/collections, where bench/draw_collections.py
draws it; its goal is a `top1` of 0.94. `quick`: two updates of a few small glyphs, whose figures mean
nothing.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import OUT, run_bench
from tests.in_process import draw_few_glyphs
from utils.config.help import ROOT
from utils.record.run_reader import RunReader

COLLECTIONS = {"glyphs": [], "fashion": [f"data.root={OUT / 'collections/fashion'}"]}
QUICK = ["loop.total_steps=2", "loop.batch_size=8", "augment.image_size_hw=[32,32]"]
GOALS_SEC = {"start": 8.0, "other": 15.0}
STAGE = re.compile(r" ([\d.]+) s\b")


def measure(name, quick):
    """Return the rows of one run."""
    run = OUT / "minute" / name
    shutil.rmtree(run, ignore_errors=True)
    words = [*COLLECTIONS[name], f"run_dir={run}", "loop.minutes=1"]
    if quick:
        words[-1:] = [*QUICK, f"data.root={draw_few_glyphs(OUT / 'few_glyphs')}"]
    started = time.monotonic()
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    stages = re.search(r"start: .*", (run / "log.txt").read_text())[0]
    last = {row["kind"]: row for row in RunReader(run).rows}
    trained = last["train"]
    found = {"start": sum(map(float, STAGE.findall(stages))), "other": seconds - trained["seconds"]}
    facts = {"stages": stages, "steps": trained["step"], "images_per_sec": round(trained["images_per_sec"])}
    facts["top1"] = last["evaluate"]["top1"]
    rows = []
    for part, goal_sec in GOALS_SEC.items():
        ratio = round(found[part] / goal_sec, 3)
        row = {"setting": f"{name}, {part}", "ours": "measured", "theirs": "goal", "figure": ratio, **facts}
        rows.append({**row, "spread": [ratio, ratio], "ms": [round(1e3 * found[part]), 1e3 * goal_sec]})
    return rows


def settings(device, quick):
    """Yield a setting for each collection; the embedded one alone if quick."""
    for name in [*COLLECTIONS][: 1 if quick else None]:
        yield name, lambda name=name: measure(name, quick)


if __name__ == "__main__":
    run_bench(settings)
