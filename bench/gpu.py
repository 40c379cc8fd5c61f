"""Everything to run on a GPU, in one command of at most eight minutes: `make bench-gpu`.

python bench/gpu.py [quick]

Runs the GPU tests, and the benches, each in a process with a time limit, and writes the output of
each and gpu.json (status and seconds of each, and the machine) to outputs/bench/gpu/. A part that fails or exceeds its
limit does not stop the others; the exit status is 1 then. quick: tries the parts on a CPU.
"""

import json
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
    "pretrain_step": (["bench/pretrain_step.py"], 200),
    "finetune_step": (["bench/finetune_step.py"], 130),
    "step_overhead": (["bench/step_overhead.py"], 30),
}


def run_part(command, limit_sec, file):
    """Run one part and keep its output; returns its status."""
    with open(file, "wb") as stream:
        try:
            return subprocess.call(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, timeout=limit_sec)
        except subprocess.TimeoutExpired:
            return "time limit"


def main():
    quick, folder, parts = "quick" in sys.argv[1:], OUT / "gpu", []
    folder.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not quick:
        sys.exit("bench/gpu.py needs a GPU, and torch sees none; `quick` tries the parts on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (arguments, limit_sec) in PARTS.items():
        started = time.monotonic()
        words = [sys.executable, *arguments, *(["quick"] if quick and name != "tests" else [])]
        status = run_part(words, limit_sec, folder / f"{name}.txt")
        parts.append({"part": name, "status": status, "seconds": round(time.monotonic() - started, 1)})
        sys.stdout.write(f"{name}: {status} after {parts[-1]['seconds']} s\n")
        sys.stdout.flush()
        found = {"machine": describe_machine(device), "quick": quick, "parts": parts}
        (folder / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(int(any(part["status"] != 0 for part in parts)))


if __name__ == "__main__":
    main()
