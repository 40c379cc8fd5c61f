"""The last screen of a run."""

from collections.abc import Sequence

from engine.run.evaluation import Evaluator
from utils.io.safe_text import Lines
from utils.record.figures import show_best, show_duration, show_lines
from utils.record.logging import log

_MUCH_WAITING = 0.1  # the last screen mentions the wait for data above this share of the training time
_WAITING = (
    "{:.0%} of the training time was spent waiting for data: raise runtime.workers or data.cache.memory_gib, pack "
    "small files into shards (prepare.py job=pack), or set augment.on_device=true where it is false"
)


def report_end(evaluator: Evaluator, seconds: float, next_commands: Sequence[str]) -> None:
    """Log the summary of a finished run. seconds: the time of this process. next_commands: suggestions."""
    learner, recorder, streams = evaluator.learner, evaluator.recorder, evaluator.streams
    folder = recorder.folder
    rows = []
    if evaluator.best.step is not None:
        metric = learner.task.best_metric
        last = evaluator.report[f"ema/{metric}" if learner.exports_average else metric]
        rows.append(("best", f"{evaluator.name_best(show_best(evaluator.result))}; last {last:.4g}"))
    rows += [("judged", finding["line"]) for finding in streams.findings if finding["key"] == "folds"]
    if classes := evaluator.tables.get("classes"):
        worst = sorted(classes, key=lambda row: row["recall"] or 0)[:6]
        rates = [f"{row['class']} {row['correct']:,} of {row['samples']:,} right" for row in worst]
        rows.append(("by class", ", ".join(rates)))
    rows += [
        ("weights", f"{folder}/weights"),
        ("curves", f"{folder}/plots/curves.png"),
        ("tables", f"{folder}/training_log.txt" + (", tables" if (folder / "tables").exists() else "")),
    ]
    if unreadable := streams.train.unreadable_count:
        rows.append(("unreadable", f"{unreadable} images, each with weight 0; see unreadable.jsonl"))
    share = recorder.clock.waited / max(recorder.clock.seconds, 1e-9)  # of the training time
    if share > _MUCH_WAITING:
        rows.append(("waiting", _WAITING.format(share)))
    rows += [("next", command) for command in next_commands]
    end = "finished" if learner.step >= learner.plan.total_steps else "stopped early by loop.early_stop_epochs"
    log.info("%s", Lines(show_lines(f"{end}: {learner.step:,} steps in {show_duration(seconds)}", rows)))
