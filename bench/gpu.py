"""Everything to run on a GPU, in one command of at most eight minutes: `make bench-gpu`.

python bench/gpu.py [output=FOLDER] [quick]

Runs the GPU tests, the GPU mode of every bench and a profile of the step, each in a process with a time limit, and
writes the output of each and gpu.json (status and seconds of each, and the machine). A part that fails or exceeds its
limit does not stop the others; the exit status is 1 then.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import OUT, describe_machine
from utils.config.entry_point import ROOT

# name: (arguments of python, seconds); together at most 480 s.
PARTS = {
    "tests": (["-m", "pytest", "-q", "-m", "gpu", "-x", "--timeout=80", "tests"], 90),
    "profile_step": (["bench/profile_step.py"], 75),
    "pretrain_step": (["bench/pretrain_step.py", "tiny"], 75),
    "finetune_step": (["bench/finetune_step.py"], 110),
    "optimizer_step": (["bench/optimizer_step.py"], 40),
    "step_overhead": (["bench/step_overhead.py"], 30),
    "save_cost": (["bench/save_cost.py"], 60),
}


def run_part(name, arguments, limit_sec, folder):
    """Run one part and keep its output; returns its row."""
    started = time.monotonic()
    file = folder / f"{name}.txt"
    with open(file, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_sec)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = "time limit"
    seconds = round(time.monotonic() - started, 1)
    sys.stdout.write(f"{name}: {status} after {seconds} s\n")
    sys.stdout.flush()
    return {"part": name, "status": status, "seconds": seconds, "output": file.name}


def main():
    words = sys.argv[1:]
    quick = "quick" in words
    folder = Path(next((word.partition("=")[2] for word in words if word.startswith("output=")), OUT / "gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not quick:
        sys.exit("bench/gpu.py needs a GPU, and torch sees none; `quick` tries the parts on a CPU")
    rows = []
    for name, (arguments, limit_sec) in PARTS.items():
        if quick:
            arguments = arguments if name == "tests" else [*arguments[:1], "quick"]
        rows.append(run_part(name, arguments, limit_sec, folder))
        machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        (folder / "gpu.json").write_text(json.dumps({"machine": machine, "quick": quick, "parts": rows}, indent=2))
    sys.exit(int(any(row["status"] != 0 for row in rows)))


if __name__ == "__main__":
    main()
