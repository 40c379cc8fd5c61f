"""What live plots cost a run: train.py with its defaults on the glyphs, with them and without, in turns.

python bench/live_plots.py [quick]            (on an idle machine; five minutes on two cores)

Figures are milliseconds per update, without each run's first row of figures, which starts up. The plots are drawn by
another process in at most 5 % of the time, so they cost at most 5 % where all cores are busy.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.commands import update_ms
from bench.measure import describe_machine, row_of, write

STEPS, TURNS = 200, 4


def main():
    quick = sys.argv[1:] == ["quick"]
    steps, turns, size = (20, 1, ["loop.global_batch_size=8"]) if quick else (STEPS, TURNS, [])
    found = {"with": [], "without": []}
    for turn in range(turns):
        for name, values in found.items():
            plots = f"tracking.live_plots={str(name == 'with').lower()}"
            values.append(update_ms(f"live_plots/{name}_{turn}", steps, "runtime.device=cpu", plots, *size))
    rows = [row_of("ResNet-18, 128 x 32 px", found, "with", "without")]
    write("live_plots", rows, machine=describe_machine(torch.device("cpu")), quick=quick)


if __name__ == "__main__":
    main()
