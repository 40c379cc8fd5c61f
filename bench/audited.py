"""What a chain of hashes costs a run, and what an audit costs beside it, in CPU seconds of whole commands.

python bench/audited.py [quick] [rows] [TEXT OF A SETTING]        (half an hour; on an idle machine)

A run is `train.py` on the embedded glyphs; its chain gets a link every quarter. One segment of four is repeated.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import OUT, Comparison, run_bench
from utils.config.help import ROOT

RUN = OUT / "audited"
SEGMENTS = 4
RUNTIME = ["runtime=reference", "runtime.device=auto", "runtime.threads=1", "runtime.workers=0"]
RECIPE = [
    "model=convnextv2_atto",
    "loop.batch_size=16",
    "augment.image_size_hw=[32,32]",
    "loop.evaluate_every_epochs=1000",
]


def call(*words):
    """Run a command of the program."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def spent_sec():
    """Return the CPU seconds of all commands so far."""
    times = os.times()
    return times.children_user + times.children_system


def settings(device, quick):
    """Yield the run with and without a chain, and the audit beside the whole run."""
    steps = 8 if quick else 400
    part = steps // SEGMENTS
    base = ["train.py", *RECIPE, *RUNTIME, f"loop.total_steps={steps}", f"loop.checkpoint_every_steps={part}"]

    def train(name, *more):
        def turn():
            shutil.rmtree(RUN / name, ignore_errors=True)
            call(*base, f"run_dir={RUN / name}", *more)

        return turn

    def audit():
        call("evaluate.py", "job=audit", f"run_dir={RUN / 'chained'}", "verify=1")

    def audited():
        chained()
        return Comparison({"audit": audit, "run": chained}, warmup=0, clock=spent_sec)

    chained = train("chained", f"loop.audit_every={part}")
    runs = {"with a chain": chained, "without": train("plain")}
    yield "a run", lambda: Comparison(runs, warmup=0, clock=spent_sec)
    yield "an audit of a quarter", audited


if __name__ == "__main__":
    run_bench(settings, turns=3)
