"""The GPU's tests and benches, part by part, each with its own limit; each figure goes to a journal at once.

python bench/gpu.py [minutes=8] [journal=docs/gpu.jsonl] [commit=HASH]          (make bench-gpu)
python bench/gpu.py quick [journal=outputs/bench/gpu_quick.jsonl]               (a rehearsal, on any machine)

Parts that the journal lacks for this device and commit come first, those that were never or longest ago measured on the
device before others; then the oldest. A part begins if its limit is within the minutes that are left. So a machine
that is there for some minutes adds rows, and the next one goes on. A part that is cut off loses only itself, and a row
that is written stays, whenever this command is killed.

A row has part, device, torch, commit, date and state: `measured` with `figure` and `spread` (least, greatest), `failed`
or `cut off`. commit: for a copy of the code without its git folder. A new part is one entry of PARTS.

`quick`: all parts with tiny sizes, on a CPU where there is no GPU, to find what is broken in them. Figures mean
nothing, and of the tests it lists those of a file.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.config.help import ROOT
from utils.ranks.processes import end_with_parent

Row = dict[str, Any]
CODE = ["*.py", "conf", ":!tests"]  # the files that a figure depends on
DEFAULTS = {"minutes": "8", "journal": str(ROOT / "docs/gpu.jsonl"), "commit": ""}
QUICK = {"minutes": "inf", "journal": str(ROOT / "outputs/bench/gpu_quick.jsonl")}


def read_row(line: str) -> Row | None:
    """Return the row that a bench has printed in this line, if it has."""
    return json.loads(line) if line.startswith('{"') else None


def read_tests(line: str) -> Row | None:
    """Return how many tests have passed or are there, if pytest has ended."""
    found = re.search(r"(\d+)(?: passed|/\d+ tests collected)", line)
    return {"figure": int(found[1]), "what": line.strip()} if found else None


@dataclass(frozen=True)
class Part:
    """A command of Python, the most seconds that it may take, and how a line of its output becomes a row."""

    words: list[str]
    limit_sec: float
    read: Callable[[str], Row | None] = field(default=read_row)

    def shorten(self) -> "Part":
        """Return the part with tiny sizes, and time for a CPU; of the tests, those of a file are listed."""
        if self.read is read_tests:
            return replace(self, words=[*self.words[:-1], "tests/engine/test_graphs.py", "--collect-only"])
        return replace(self, words=[*self.words, "quick"], limit_sec=3 * self.limit_sec)


# In the order of their worth; the first four take eight minutes at most, all of them 45. No part may take more than
# four, and none needs a download.
PARTS = {
    "a minute": Part(["bench/minute.py", "rows", "glyphs"], 150),
    "fine-tuning, tiny": Part(["bench/finetune_step.py", "rows", "convnextv2_tiny, eager"], 100),
    "tests": Part(["-m", "pytest", "-n", "8", "-m", "gpu", "--timeout=90", "tests"], 130, read_tests),
    "images cut on the device": Part(["bench/device_copy.py", "rows", "crops"], 60),
    "fine-tuning, tiny, timm compiled": Part(["bench/finetune_step.py", "rows", "convnextv2_tiny, timm compiled"], 240),
    "SDXL, step": Part(["bench/sdxl.py", "rows", "step"], 180),
    "SDXL, start": Part(["bench/sdxl.py", "rows", "start"], 200),
    "fine-tuning, tiny, compiled": Part(["bench/finetune_step.py", "rows", "convnextv2_tiny, compiled"], 240),
    **{f"SDXL, memory, {gib} GB": Part(["bench/memory.py", "rows", f", {gib} GB"], 240) for gib in (8, 12, 16, 24)},
}


def read_words(defaults: Mapping[str, str], words: Iterable[str]) -> dict[str, str]:
    """Return the values of a command's words KEY=VALUE; ends it if a word is none, or has another key."""
    given = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in given:
            sys.exit(f"{sys.argv[0]}: {word!r} is not KEY=VALUE with a key of {', '.join(given)}")
        given[key] = value
    return given


class Journal:
    """Rows of a file, one line of JSON each. A line that a killed process left incomplete is passed over."""

    def __init__(self, path: Path, facts: Row) -> None:
        """facts: device, torch and commit, which each new row gets."""
        self.path = path
        self.facts = facts

    def rows(self) -> list[Row]:
        """Return all rows."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def add(self, row: Row) -> None:
        """Append a row with the facts and the time."""
        text = self.path.read_text() if self.path.exists() else ""
        begin = "" if text.endswith("\n") or not text else "\n"
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        with self.path.open("a") as file:
            file.write(f"{begin}{json.dumps({**row, **self.facts, 'date': date})}\n")

    def order(self, names: Iterable[str]) -> list[str]:
        """Return the parts in the order in which they are due; parts that are alike stay in theirs."""
        here = [row for row in self.rows() if row["device"] == self.facts["device"]]
        last = {row["part"]: row["date"] for row in here}
        done = {row["part"] for row in here if row["commit"] == self.facts["commit"]}
        return sorted(names, key=lambda name: (name in done, last.get(name, "")))


def run_part(name: str, part: Part, journal: Journal) -> bool:
    """Run a part and add its rows, the last one too if it fails or is cut off; returns whether it ended well."""
    command = [sys.executable, *part.words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=end_with_parent,
    )  # fmt: skip
    cut_off = threading.Event()

    def end() -> None:
        cut_off.set()
        os.killpg(process.pid, signal.SIGKILL)  # its own processes too, which hold its output open

    timer = threading.Timer(part.limit_sec, end)
    timer.start()
    started = time.monotonic()
    line = ""
    is_measured = False
    for line in process.stdout:
        sys.stdout.write(line)
        row = part.read(line)
        if row is not None:
            journal.add({"part": name, "state": "measured", **row})
            is_measured = True
    status = process.wait()
    timer.cancel()
    seconds = round(time.monotonic() - started, 1)
    if cut_off.is_set():
        journal.add({"part": name, "state": "cut off", "seconds": seconds})
    elif status != 0 or not is_measured:
        journal.add({"part": name, "state": "failed", "seconds": seconds, "error": line.strip()[:300]})
    sys.stdout.write(f"{name}: {seconds:.0f} s, status {status}\n")
    return status == 0 and is_measured


def run_parts(parts: Mapping[str, Part], journal: Journal, seconds: float) -> list[str]:
    """Run the parts that fit into the seconds, in the order in which they are due; returns those that went wrong."""
    ends = time.monotonic() + seconds
    wrong = []
    for name in journal.order(parts):
        if time.monotonic() + parts[name].limit_sec > ends:
            sys.stdout.write(f"{name}: not begun, too few seconds are left\n")
        elif not run_part(name, parts[name], journal):
            wrong.append(name)
    return wrong


def find_commit() -> str:
    """Return the last commit of the code, with `-dirty` if it has changes since; `unknown` without a git folder."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words, "--", *CODE], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("log", "-1", "--format=%h", "--abbrev=8")
    return commit + "-dirty" * bool(git("status", "--porcelain")) if commit else "unknown"


def main() -> None:
    """Run what is due on this machine's GPU, or rehearse."""
    quick = "quick" in sys.argv
    given = read_words(DEFAULTS | QUICK if quick else DEFAULTS, [word for word in sys.argv[1:] if word != "quick"])
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or quick):
        sys.exit("gpu: this machine has no GPU that torch can use; `quick` rehearses on the CPU")
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    commit = given["commit"] or find_commit()
    facts = {"device": device, "torch": torch.__version__, "commit": commit}
    parts = {name: part.shorten() if quick else part for name, part in PARTS.items()}
    wrong = run_parts(parts, Journal(Path(given["journal"]), facts), 60 * float(given["minutes"]))
    if wrong:
        sys.exit(f"gpu: {', '.join(wrong)}: failed or cut off; {given['journal']} says how")


if __name__ == "__main__":
    main()
