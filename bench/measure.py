"""The runner of the benches: sides measured in turns, ratios with their spread, a table and a JSON file.

A bench yields comparisons, and `run_bench` does the rest:

    def comparisons(device, quick):
        yield Comparison("atto, eager", {"ours": turn, "theirs": other_turn}, steps=10)

    if __name__ == "__main__":
        run_bench(comparisons)

Compare numbers only within one run: after a warm-up, the sides take turns (A, B, A, B, ...), and each ratio compares
two neighbouring turns.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from pydantic import TypeAdapter
from torch.profiler import ProfilerActivity, profile

from engine.config import RuntimeConfig, TrainingConfig
from engine.plan import Plan
from engine.run.loop import Run
from engine.task import Streams
from engine.update.runtime import Runtime, choose_runtime
from utils.config.entry_point import Job
from utils.config.help import CONF, ROOT, read_values
from utils.record.figures import align_columns
from utils.record.run_folder import RunFolder

OUT = ROOT / "outputs/bench"
# Nothing is due in a run with these values of `loop`.
BENCH_LOOP = {"log_every_steps": 10**9, "evaluate_every_epochs": 1e9, "checkpoint_every_steps": 10**9}
_PAUSE_SEC = 0.3  # before a turn on a CPU: idle threads of another side's own pool spin for a while

Turn = Callable[[], Any]


@dataclass(frozen=True)
class Comparison:
    """Sides of one setting: name -> a function that makes `steps` steps. The first is ours, and compared with each.

    warmup: calls of each side that are not counted. facts: what else the JSON file says; `teraflop`, the arithmetic of
    a step of our side, gives our rate. clock: what gives the seconds, such as time.process_time where one thread does
    the work; None: the device's.
    """

    setting: str
    sides: dict[str, Turn]
    steps: int = 1
    warmup: int = 1
    facts: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] | None = None


def run_bench(comparisons: Callable[[torch.device, bool], Iterable[Comparison]], turns: int = 5) -> None:
    """Measure what `comparisons(device, quick)` yields, print it and write outputs/bench/<script>.json.

    The file also has a profile of our side of each comparison, and on a GPU the most memory that each side takes beyond
    the weights. The command's only word is `quick`: two turns and one profile, to outputs/bench/quick/; their figures
    mean nothing.
    """
    if sys.argv[1:] not in ([], ["quick"]):
        sys.exit(f"{sys.argv[0]}: the only argument is quick")
    quick, rows = len(sys.argv) > 1, []
    device = runtime_of("fp32").device
    path = (OUT / "quick" if quick else OUT) / f"{Path(sys.argv[0]).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, comparison in enumerate(comparisons(device, quick)):
        found = measure(comparison, device, 2 if quick else turns)
        if number == 0 or not quick:
            found[-1]["profile_percent"] = top_operations(next(iter(comparison.sides.values())), device)
        rows += found
        report = {"machine": describe_machine(device), "quick": quick, "rows": rows}
        path.write_text(json.dumps(report, indent=2) + "\n")
        sys.stdout.write(f"{table(found)}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{path.relative_to(ROOT)}\n")


def measure(comparison: Comparison, device: torch.device, turns: int) -> list[dict[str, Any]]:
    """Return a row for our side against each other one: median milliseconds of a step, and the ratio of the turns."""
    found, peaks = take_turns(comparison, device, turns)
    ours, *others = comparison.sides
    facts, rows = dict(comparison.facts), []
    if "teraflop" in facts:
        facts["ours_teraflop_per_sec"] = round(1e3 * facts["teraflop"] / statistics.median(found[ours]), 1)
    for theirs in others:
        ratios = [above / below for above, below in zip(found[ours], found[theirs])]
        if device.type == "cuda":
            facts |= {"ours_peak_gib": peaks[ours], "theirs_peak_gib": peaks[theirs]}
        rows.append(
            {
                "setting": comparison.setting, "ours": ours, "theirs": theirs,
                "ours_ms": round(statistics.median(found[ours]), 3),
                "theirs_ms": round(statistics.median(found[theirs]), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
                **facts,
            }
        )  # fmt: skip
    return rows


def take_turns(
    comparison: Comparison, device: torch.device, turns: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return milliseconds per step of each side and turn, and the most GiB of a GPU that each warm-up adds."""
    peaks: dict[str, float] = {}
    for name, turn in comparison.sides.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        for _ in range(comparison.warmup):
            time_ms(turn, device, comparison.clock)
        if device.type == "cuda":
            peaks[name] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
    found: dict[str, list[float]] = {name: [] for name in comparison.sides}
    for _ in range(turns):
        for name, turn in comparison.sides.items():
            time.sleep(_PAUSE_SEC if device.type == "cpu" else 0.0)
            found[name].append(time_ms(turn, device, comparison.clock) / comparison.steps)
    return found, peaks


def time_ms(turn: Turn, device: torch.device, clock: Callable[[], float] | None) -> float:
    """Return the milliseconds of one turn, to the end of its work on the device."""
    if clock is None and device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        turn()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)
    clock = clock or time.perf_counter
    started = clock()
    turn()
    return 1e3 * (clock() - started)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table; below 1, ours is faster."""
    cells = [("setting", "ours", "ms", "theirs", "ms", "ratio (least to greatest)")]
    for row in rows:
        low, high = row["ratio_min_max"]
        spread = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        cells.append(
            (row["setting"], row["ours"], f"{row['ours_ms']:.2f}", row["theirs"], f"{row['theirs_ms']:.2f}", spread)
        )
    return align_columns(cells)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions that a figure was measured with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), **versions}


def top_operations(turn: Turn, device: torch.device, count: int = 12) -> dict[str, float]:
    """Return the operations that take most of a turn, in percent of the time of all."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        turn()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1
    return {event.key[:80]: round(100 * getattr(event, key) / total, 1) for event in events[:count]}


def repeated(step: Callable[[int], Any], steps: int) -> Turn:
    """Return a turn that makes `steps` steps, each told its number."""
    return lambda: [step(number) for number in range(steps)]


# -------------------------------------------------------------------------------------------------- parts of the engine


def read_group(kind: Any, group: str, option: str, **changes: Any) -> Any:
    """Return an option of a configuration group as its schema, with changed values."""
    return TypeAdapter(kind).validate_python(read_values(group, option) | changes)


def runtime_of(precision: str) -> Runtime:
    """Return the runtime of this machine's best device at a precision, eager, with torch's own thread count."""
    config = read_group(RuntimeConfig, "runtime", "reference", device="auto", precision=precision, deterministic=False)
    return choose_runtime(config)


def build_bench_run(
    task: Any,
    *,
    batch_size: int,
    accum_steps: int = 1,
    epoch_steps: int = 10**6,
    runtime: dict[str, Any],
    optim: dict[str, Any] | None = None,
    loop: dict[str, Any] | None = None,
) -> Run:
    """Build a run as engine/run/loop.py does, in which nothing is due: no log, evaluation or checkpoint.

    An epoch has `epoch_steps` updates, so one call of train_one_epoch makes that many. runtime, optim, loop: changed
    values of these groups; `option` names the file of the group: reference, adamw and default if absent.
    """
    groups = {
        "optim": {"option": "adamw", **(optim or {})},
        "schedule": {"option": "cosine"},
        "runtime": {"option": "reference", **runtime},
        "tracking": {"option": "jsonl"},
        "loop": {"option": "default", "clip_grad_norm": 1.0, **BENCH_LOOP, **(loop or {})},
    }
    values: dict[str, Any] = {}
    for name, changes in groups.items():
        values[name] = read_values(name, changes.pop("option")) | changes
    common = yaml.safe_load((CONF / "common.yaml").read_text()) | {"resume": "never"}
    config = TrainingConfig.model_validate({**common, **values})
    size = batch_size * accum_steps
    plan = Plan(1, size, batch_size, accum_steps, epoch_steps * size, 10**6, 100, 1e-3, 1e9)
    folder = RunFolder(OUT, config.model_dump(mode="json"), Job("bench", {}, []))
    return Run(task, Streams(None, {}, {}), plan, config, choose_runtime(config.runtime), folder)
