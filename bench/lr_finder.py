"""The rate that the range test suggests, beside the best of a grid, and beside torch-lr-finder's suggestion.

python bench/lr_finder.py [KEY=VALUE ...] [rates=0.01,0.03,...] [seeds=1] [quick]      (on an idle machine)

For each seed: train.py with its defaults and the values given finds a rate and trains with it; then the same run with
each rate of the grid and no search; then torch-lr-finder 0.2.2 at its defaults (100 iterations up to a rate of 10,
exponential, smoothing 0.05, steepest gradient) on the same network, optimiser and images, in float32. The last table
has top-1 after the last step; the finder's cost is its share of the run's seconds, without its first update, which
compiles. torch-lr-finder is installed into outputs/bench/torch_lr_finder/.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.commands import ROOT, last_top1, log_of, read_number, run_command

OUT = ROOT / "outputs/bench/lr_finder"
RIVAL = ROOT / "outputs/bench/torch_lr_finder"
RATES = "0.003,0.01,0.03,0.1,0.3,1.0"
QUICK = ["loop.total_steps=32", "lr_finder.max_share=1.0", "loop.global_batch_size=16", "runtime.compile=false"]
PYTHON = sys.executable


def train(name, overrides):
    """Run train.py into a folder; returns (top-1, seconds in all)."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)  # an earlier bench's
    words = ["train.py", f"run_dir={folder}", "tracking.live_plots=false", *overrides]
    seconds = run_command([PYTHON, *words], log_of(folder))
    return last_top1(folder), seconds


def install_rival():
    """Install torch-lr-finder into a folder of its own; returns whether it can be imported."""
    if not (RIVAL / "torch_lr_finder").is_dir():
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(RIVAL)]
        done = subprocess.run([*pip, "torch-lr-finder==0.2.2"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"lr_finder: torch-lr-finder could not be installed:\n{done.stderr[-1000:]}")


def rival_suggestion(overrides):
    """Return the rate that torch-lr-finder suggests for the network, optimiser and images of train.py."""
    install_rival()
    sys.path.insert(0, str(RIVAL))
    import torch
    from torch_lr_finder import LRFinder

    from engine.learner import Learner
    from engine.run import build_task, derive_plan, start_ranks
    from engine.tasks.kinds import find_kind
    from tests.in_process import configure

    config, _ = configure("train", [*overrides, "runtime.precision=fp32", "runtime.compile=false"])
    runtime, kind = start_ranks(config), find_kind(config.task.name, "task.name")
    data = kind.pipeline.open_training(config, runtime, OUT / "rival")
    setup = kind.set_up(config, data.collection)
    streams = kind.pipeline.streams(data, setup, config)
    task = build_task(lambda: kind.build(setup), config)
    plan = derive_plan(config, streams)
    learner = Learner(task, config, plan, runtime)
    steps = streams.train.steps(0, plan)

    class Pairs(torch.utils.data.IterableDataset):
        def __iter__(self):
            for batches in steps:
                for batch in batches:
                    yield task.normalise(batch["images"]), batch["labels"]

    loss = torch.nn.CrossEntropyLoss(label_smoothing=config.task.label_smoothing)
    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-6
    finder = LRFinder(task.network, learner.optimizer, loss, device="cpu")
    finder.range_test(torch.utils.data.DataLoader(Pairs(), batch_size=None), end_lr=10.0, num_iter=100)
    import matplotlib

    matplotlib.use("Agg")
    _, rate = finder.plot(suggest_lr=True)
    steps.close()
    return float(rate)


def rate_of(report):
    """Return the rate that a range test takes, as text."""
    return "none" if report["taken"] is None else f"{report['taken']:.3g}"


def main():
    words = sys.argv[1:]
    quick, words = "quick" in words, [word for word in words if word != "quick"]
    if wrong := [word for word in words if "=" not in word]:
        sys.exit(f"lr_finder: {wrong[0]!r} is neither quick nor KEY=VALUE\n{__doc__.splitlines()[2]}")
    named = dict(word.split("=", 1) for word in words)
    rates = [read_number("rates", text, float) for text in named.pop("rates", "0.1" if quick else RATES).split(",")]
    seeds = range(read_number("seeds", named.pop("seeds", "1"), int))
    overrides = [f"{key}={value}" for key, value in named.items()] + (QUICK if quick else [])
    place = "quick/" if quick else ""
    found, top1, shares = [], {}, []
    for seed in seeds:
        value, seconds = train(f"{place}found_{seed}", [*overrides, f"seed={seed}"])
        file = OUT / f"{place}found_{seed}/lr_finder.json"
        if not file.exists():
            sys.exit("lr_finder: the run is too short for a range test; set loop.total_steps=300 or more")
        report = json.loads(file.read_text())
        found.append(report)
        shares.append((report["seconds"] - report["curve"]["first_update_sec"]) / seconds)
        top1.setdefault("found", []).append(value)
        for rate in rates:
            given = [*overrides, f"seed={seed}", "lr_finder.enabled=false", f"optim.lr={rate}"]
            top1.setdefault(rate, []).append(train(f"{place}rate_{rate:g}_{seed}", given)[0])
    best = max(rates, key=lambda rate: mean(top1[rate]))
    lines = ["| rate | top-1 |", "|---|---|"]
    for rate, values in top1.items():
        name = "found: " + ", ".join(map(rate_of, found)) if rate == "found" else f"{rate:g}"
        lines.append(f"| {name} | {mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) |")
    for one in found:
        if one["taken"] is None:
            lines.append(f"no answer: {one['reason']}; the run kept {one['configured']:g}")
            continue
        taken, named = one["taken"], ", ".join(f"{k} {v:.3g}" for k, v in one["rates"].items())
        lines.append(f"takes {rate_of(one)} ({named}): {taken / best:.2f} times the best of the grid, {best:g}")
    lines.append(f"the range test's share of the run's seconds: {', '.join(f'{share:.3f}' for share in shares)}")
    if not quick:  # it is installed from PyPI
        lines.append(f"torch-lr-finder 0.2.2 suggests {rival_suggestion(overrides):.3g}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
