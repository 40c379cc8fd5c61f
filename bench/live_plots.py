"""What live plots cost a run: train.py with its defaults on the glyphs, with them and without, in turns.

python bench/live_plots.py [quick]            (on an idle machine; five minutes on two cores)

Figures are milliseconds per update, without each run's first row of figures, which starts up. The plots are drawn by
another process in at most 5 % of the time, so they cost at most 5 % where all cores are busy.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.commands import ROOT, log_of, run_command, step_windows
from bench.measure import describe_machine, row_of, write

STEPS, TURNS = 200, 4


def train(name, live_plots, steps):
    """Train; returns the milliseconds of an update."""
    folder = ROOT / "outputs/bench/live_plots" / name
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        f"run_dir={folder}", f"tracking.live_plots={live_plots}", f"loop.total_steps={steps}",
        "loop.log_every_steps=10", "lr_finder.enabled=false", "runtime.compile=false", "runtime.device=cpu",
        "loop.evaluate_every_epochs=1.0e+9", "loop.checkpoint_every_steps=1000000000",
    ]  # fmt: skip
    run_command([sys.executable, "train.py", *words], log_of(folder))
    windows = step_windows(folder)[1:]
    return 1e3 * sum(seconds for _, seconds in windows) / sum(steps for steps, _ in windows)


def main():
    quick = sys.argv[1:] == ["quick"]
    steps, turns = (20, 1) if quick else (STEPS, TURNS)
    found = {"with": [], "without": []}
    for turn in range(turns):
        for name, values in found.items():
            values.append(train(f"{name}_{turn}", str(name == "with").lower(), steps))
    rows = [row_of("ResNet-18, 128 x 32 px", found, "with", "without")]
    write("live_plots", rows, machine=describe_machine(torch.device("cpu")), quick=quick)


if __name__ == "__main__":
    main()
