"""What the benches share: sides measured in turns, ratios with their spread, a table and a JSON file.

Numbers are compared within one run only: the sides take turns (A, B, A, B, ...), after a warm-up of each, and a ratio
is that of two neighbouring turns.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from engine.config import LoopConfig, RuntimeConfig, TrainingConfig
from engine.plan import Plan
from engine.run_parts import Run, build_run
from engine.runtime import Runtime, choose_runtime
from engine.streams import Streams
from utils.config.entry_point import CONF, ROOT, Job
from utils.ranks.signals import StopRequest
from utils.record.run_folder import RunFolder
from utils.text_table import align_columns

OUT = ROOT / "outputs/bench"
# Nothing is due in a run with these values of `loop`.
BENCH_LOOP = {"log_every_steps": 10**9, "evaluate_every_epochs": 1e9, "checkpoint_every_steps": 10**9}


def read_group(kind: Any, group: str, option: str, **changes: Any) -> Any:
    """Return an option of a configuration group as its schema, with changed values."""
    values = yaml.safe_load((CONF / group / f"{option}.yaml").read_text()) | changes
    return TypeAdapter(kind).validate_python(values)


def bench_loop() -> LoopConfig:
    """Return the loop's configuration of a run in which nothing is due."""
    return read_group(LoopConfig, "loop", "default", **BENCH_LOOP)


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
    """Build a run as engine/run.py does, in which nothing is due: no log, evaluation or checkpoint.

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
        file = CONF / name / f"{changes.pop('option')}.yaml"
        values[name] = yaml.safe_load(file.read_text()) | changes
    common = yaml.safe_load((CONF / "common.yaml").read_text()) | {"resume": "never"}
    config = TrainingConfig.model_validate({**common, **values})
    size = batch_size * accum_steps
    plan = Plan(1, size, batch_size, accum_steps, epoch_steps * size, 10**6, 100, 1e-3)
    folder = RunFolder(OUT, config.model_dump(mode="json"), Job("bench", {}, []))
    streams = Streams(None, {}, {})
    return build_run(task, streams, config, plan, choose_runtime(config.runtime), folder, StopRequest())


def runtime_of(precision: str) -> Runtime:
    """Return the runtime of this machine's best device at a precision, eager, with torch's own thread count."""
    config = read_group(RuntimeConfig, "runtime", "reference", device="auto", precision=precision, deterministic=False)
    return choose_runtime(config)


def time_ms(turn: Callable[[], None], device: torch.device) -> float:
    """Return the milliseconds of one turn, to the end of its work on the device."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        turn()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)
    started = time.perf_counter()
    turn()
    return 1e3 * (time.perf_counter() - started)


def take_turns(
    sides: dict[str, Callable[[], None]],
    *,
    steps: int,
    warmup: int,
    turns: int,
    device: torch.device,
    pause_sec: float = 0.0,
) -> dict[str, list[float]]:
    """Return milliseconds per step of each side and turn; a call makes `steps` steps, `warmup` counts calls.

    pause_sec: before each turn, for sides with thread pools of their own: idle threads spin for a while.
    """
    for turn in sides.values():
        for _ in range(warmup):
            time_ms(turn, device)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, turn in sides.items():
            time.sleep(pause_sec)
            found[name].append(time_ms(turn, device) / steps)
    return found


def ratio_of(numerator: list[float], denominator: list[float]) -> dict[str, Any]:
    """Return the ratio of each turn's pair as median, least and greatest."""
    ratios = [above / below for above, below in zip(numerator, denominator)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def compare(
    first: Callable[[int], None], second: Callable[[int], None], device: torch.device, *, quick: bool
) -> dict[str, Any]:
    """Measure two functions of the step's number in turns: medians in ms, and the ratio first / second."""
    warmup, steps, turns = (1, 1, 2) if quick else (2, 3, 5)

    def turn_of(step: Callable[[int], None]) -> Callable[[], None]:
        def turn() -> None:
            for number in range(steps):
                step(number)

        return turn

    sides = {"first": turn_of(first), "second": turn_of(second)}
    found = take_turns(sides, steps=steps, warmup=warmup, turns=turns, device=device)
    medians = {f"{name}_ms": round(statistics.median(values), 3) for name, values in found.items()}
    return {**medians, **ratio_of(found["first"], found["second"])}


def row_of(setting: str, found: dict[str, list[float]], ours: str, theirs: str) -> dict[str, Any]:
    """Return a row for `table`: medians in ms, and the ratio ours / theirs (below 1: ours is faster)."""
    return {
        "setting": setting,
        "ours": ours,
        "theirs": theirs,
        "ours_ms": round(statistics.median(found[ours]), 3),
        "theirs_ms": round(statistics.median(found[theirs]), 3),
        **ratio_of(found[ours], found[theirs]),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the machine that a figure was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of `row_of` as a table."""
    cells = [("setting", "ours", "ms", "theirs", "ms", "ratio (least to greatest)")]
    for row in rows:
        low, high = row["ratio_min_max"]
        spread = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        cells.append(
            (row["setting"], row["ours"], f"{row['ours_ms']:.2f}", row["theirs"], f"{row['theirs_ms']:.2f}", spread)
        )
    return align_columns(cells)


def write(name: str, rows: list[dict[str, Any]], *, quick: bool, **more: Any) -> Path:
    """Print the table and write outputs/bench/<name>.json; quick runs go to quick/."""
    path = (OUT / "quick" if quick else OUT) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**more, "quick": quick, "rows": rows}, indent=2) + "\n")
    sys.stdout.write(f"{table(rows)}\n{path.relative_to(ROOT)}\n")
    return path


def report(row: dict[str, Any]) -> None:
    """Print one result as JSON."""
    sys.stdout.write(json.dumps(row, indent=2) + "\n")
    sys.stdout.flush()
