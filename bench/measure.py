"""The runner of the benches: sides measured in turns, ratios with their spread, as a table or as rows of JSON.

A bench names its settings, each with a function that builds it, and `run_bench` does the rest:

    def settings(device, quick):
        yield "atto, eager", lambda: Comparison({"ours": turn, "theirs": other_turn}, steps=10)

    if __name__ == "__main__":
        run_bench(settings)

Compare numbers only within one run: after a warm-up, the sides take turns (A, B, A, B, ...), and each ratio compares
two neighbouring turns.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch.utils.flop_counter import FlopCounterMode

from engine.config import RuntimeConfig, TrainingConfig
from engine.plan import Plan
from engine.run.loop import Run
from engine.run.timing import wait_for
from engine.task import Streams
from engine.update.runtime import Runtime, choose_runtime
from utils.config.entry_point import Job
from utils.config.help import CONF, ROOT
from utils.record.figures import align_columns
from utils.record.run_folder import RunFolder

OUT = ROOT / "outputs/bench"
# Nothing is due in a run with these values of `loop`.
BENCH_LOOP = {"log_every_steps": 10**9, "evaluate_every_epochs": 1e9, "checkpoint_every_steps": 10**9}
SMALL_NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}  # a ConvNeXt for `quick`
_PAUSE_SEC = 0.3  # before a turn on a CPU: idle threads of another side's own pool spin for a while

Turn = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Sides of one setting: name -> a function that makes `steps` steps. The first is ours, and compared with each.

    warmup: calls of each side that are not counted. flops: the arithmetic of a side's step, if rows are to say how much
    of it is done in a second, beside large matrices in bf16. facts: what else a row says. clock: what gives the
    seconds, such as time.process_time where one thread does the work; None: the device's.
    """

    sides: dict[str, Turn]
    steps: int = 1
    warmup: int = 1
    flops: dict[str, float] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)
    clock: Callable[[], float] | None = None


Settings = Iterable[tuple[str, Callable[[], "Comparison | Iterable[Row]"]]]  # rows: figures that no comparison gives


def run_bench(settings: Callable[[torch.device, bool], Settings], turns: int = 5) -> None:
    """Measure the settings and print each as soon as it is there.

    The command's words: `quick`, two turns of tiny sizes, whose figures mean nothing; `rows`, one line of JSON for each
    ratio in place of a table; and any text, for settings with that text in their name.
    """
    words = sys.argv[1:]
    quick = "quick" in words
    texts = [word for word in words if word not in ("quick", "rows")]
    device = runtime_of("fp32").device
    if quick:
        torch.compiler.set_stance("force_eager")  # compiling takes minutes
    found = False
    for name, build in settings(device, quick):
        if not all(text in name for text in texts):
            continue
        found = True
        built = build()
        rows = measure(name, built, device, 2 if quick else turns) if isinstance(built, Comparison) else built
        for text in map(json.dumps, rows) if "rows" in words else [table(list(rows))]:
            print(text, flush=True)
    if not found:
        names = ", ".join(name for name, _ in settings(device, quick))
        sys.exit(f"{sys.argv[0]}: no setting has {' and '.join(texts)} in its name; the settings here: {names}")


def measure(name: str, comparison: Comparison, device: torch.device, turns: int) -> list[Row]:
    """Return a row for our side against each other one: median milliseconds of a step, and the ratio of the turns."""
    peaks = {side: warm_up(turn, comparison, device) for side, turn in comparison.sides.items()}
    times = take_turns(comparison, device, turns)
    ours, *others = comparison.sides
    medians = {side: round(statistics.median(found), 3) for side, found in times.items()}
    rates = {side: round(1e-9 * flops / medians[side], 3) for side, flops in comparison.flops.items()}
    bound = measure_bound(device) if rates else None
    rows = []
    for theirs in others:
        ratios = [above / below for above, below in zip(times[ours], times[theirs])]
        row = {"setting": name, "ours": ours, "theirs": theirs, "what": "time, ours over theirs"}
        row["figure"] = round(statistics.median(ratios), 3)
        row["spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
        row["ms"] = [medians[ours], medians[theirs]]
        if device.type == "cuda":
            row["peak_gib"] = [peaks[ours], peaks[theirs]]
        if rates:
            row["teraflop_per_sec"] = [rates[ours], rates[theirs]]
            row["bound_teraflop_per_sec"] = round(bound, 3)
            row["share_of_bound"] = [round(rates[side] / bound, 3) for side in (ours, theirs)]
        rows.append({**row, **comparison.facts})
    return rows


def count_flops(task: Any, batch: Any) -> int:
    """Return the arithmetic of a step: three times that of a forward pass, as its backward pass has twice as much."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task(batch, 0.0)
    return 3 * counter.get_total_flops()


def measure_bound(device: torch.device) -> float:
    """Return the TFLOP/s of large bf16 matrices, the best of some turns. On a CPU they are small, and say nothing."""
    side = 8192 if device.type == "cuda" else 128
    matrix = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    turn = repeated(lambda: matrix @ matrix, 10)
    return max(10 * 2e-9 * side**3 / time_ms(turn, device) for _ in range(5))


def warm_up(turn: Turn, comparison: Comparison, device: torch.device) -> float:
    """Make the turns that are not counted; returns the most GiB of a GPU that they add."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(comparison.warmup):
        time_ms(turn, device, comparison.clock)
    return round((torch.cuda.max_memory_allocated() - held) / 2**30, 2) if on_gpu else 0.0


def take_turns(comparison: Comparison, device: torch.device, turns: int) -> dict[str, list[float]]:
    """Return milliseconds per step of each side and turn."""
    found: dict[str, list[float]] = {name: [] for name in comparison.sides}
    for _ in range(turns):
        for name, turn in comparison.sides.items():
            time.sleep(_PAUSE_SEC if device.type == "cpu" else 0.0)
            found[name].append(time_ms(turn, device, comparison.clock) / comparison.steps)
    return found


def time_ms(turn: Turn, device: torch.device, clock: Callable[[], float] | None = None) -> float:
    """Return the milliseconds of one turn, to the end of its work on the device."""
    clock = clock or time.perf_counter
    wait_for(device)
    started = clock()
    turn()
    wait_for(device)
    return 1e3 * (clock() - started)


def compare_with_goal(
    setting: str, measured: float, wanted: float, unit: str = "ms", theirs: str = "goal", **facts: Any
) -> Row:
    """Return the row of a figure that is measured once, over a goal or a prediction; facts: what else it says."""
    ratio = round(measured / wanted, 3)
    row = {"setting": setting, "ours": "measured", "theirs": theirs, "what": f"{unit}, measured over {theirs}"}
    return {**row, "figure": ratio, "spread": [ratio, ratio], unit: [round(measured, 2), round(wanted, 2)], **facts}


def table(rows: list[Row]) -> str:
    """Return the rows as a table; below 1, ours is faster."""
    unit = "gib" if "gib" in rows[0] else "ms"
    cells = [("setting", "ours", unit, "theirs", unit, "ratio (least to greatest)")]
    for row in rows:
        low, high = row["spread"]
        ours_ms, theirs_ms = (f"{value:.2f}" for value in row[unit])
        spread = f"{row['figure']:.3f} ({low:.3f} to {high:.3f})"
        cells.append((row["setting"], row["ours"], ours_ms, row["theirs"], theirs_ms, spread))
    return align_columns(cells)


def repeated(step: Callable[[], Any], steps: int) -> Turn:
    """Return a turn that makes `steps` steps."""
    return lambda: [step() for _ in range(steps)]


# -------------------------------------------------------------------------------------------------- parts of the engine


def read_values(group: str, name: str) -> Row:
    """Return the values of a group's file and of those that it builds on."""
    own = OmegaConf.load(CONF / group / f"{name}.yaml")
    bases = [read_values(group, base) for base in own.pop("defaults", ()) if isinstance(base, str)]
    return OmegaConf.to_container(OmegaConf.merge(*bases, own))


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
    runtime: Row,
    optim: Row | None = None,
    loop: Row | None = None,
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
    values: Row = yaml.safe_load((CONF / "common.yaml").read_text()) | {"resume": "never"}
    for name, changes in groups.items():
        values[name] = read_values(name, changes.pop("option")) | changes
    config = TrainingConfig.model_validate(values)
    size = batch_size * accum_steps
    plan = Plan(
        world_size=1,
        batch_size=size,
        micro_batch_size=batch_size,
        accum_steps=accum_steps,
        epoch_length=epoch_steps * size,
        total_steps=10**6,
        warmup_steps=100,
        lr=1e-3,
        evaluate_every_epochs=1e9,
    )
    folder = RunFolder(OUT, config.model_dump(mode="json"), Job("bench", {}, []))
    return Run(task, Streams(None, {}, {}), plan, config, choose_runtime(config.runtime), folder)
