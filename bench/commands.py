"""A command of the repository that a bench runs: its output in a file, and the rows of figures that it left."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_command(command, log, *, may_fail=False):
    """Run a command from the repository, its output in `log`; returns its seconds.

    Ends the bench where it fails, unless it may.
    """
    command = list(map(str, command))
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(log, "w") as stream:
        code = subprocess.call(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    sys.stderr.write(f"{log.stem}: {seconds:.0f} s in all\n")
    if code != 0 and not may_fail:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        fail(f"{' '.join(command)} ended with status {code} ({log}):\n{tail}")
    return seconds


def fail(message):
    """End the bench with a message."""
    sys.exit(f"{Path(sys.argv[0]).stem}: {message}")


def read_settings(**defaults):
    """Return the command line's KEY=VALUE over the defaults, as texts, and whether it says `quick`."""
    words, given = sys.argv[1:], dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in given:
            given[key] = value
        elif word != "quick":
            fail(f"{word!r} is neither quick nor KEY=VALUE with a key of {', '.join(defaults)}")
    return given, "quick" in words


def read_number(key, text, kind):
    """Return the number above 0 in a setting's text, a whole one if kind is int; ends the bench where it is none."""
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        fail(f"{key}: {text!r} is not a {'whole ' if kind is int else ''}number above 0")
    return number


def log_of(folder):
    """Return the file beside a run's folder for the output of its command."""
    return folder.with_name(f"{folder.name}.log")  # not with_suffix: the name may have a point


def read_rows(file):
    """Return the rows of a JSONL file, none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rows_of(folder, kind):
    """Return a run's rows of figures of one kind: train, evaluate or epoch."""
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def last_top1(folder):
    """Return top-1 of a run's last evaluation."""
    return rows_of(folder, "evaluate")[-1]["top1"]


def step_windows(folder):
    """Return (steps, seconds) between a run's rows of training figures."""
    batch = json.loads((folder / "config.json").read_text())["loop"]["global_batch_size"]
    windows, before = [], 0
    for row in rows_of(folder, "train"):
        steps = row["step"] - before
        windows.append((steps, steps * batch / row["images_per_sec"]))
        before = row["step"]
    return windows
