"""`train.py curve=true`: a learning curve, and what twice the labels would give.

A quarter and a half of each class are trained on in RUN/curve_25 and RUN/curve_50, then all of it in RUN: jobs like
those of a sweep (`sweep.gpus` holds), so the same command continues. Each run repeats the command's
words, so each takes its full length (with `loop.minutes`, the full time). The law error = a + b n^-c is fitted to the
three errors; a or b is 0 where it would be negative.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from data.collection.choose import training_rows
from data.open import load_collection
from engine.tasks.kind import ImageTrainingConfig
from engine.tasks.kinds import KINDS
from engine.train import train
from utils.config.entry_point import Job
from utils.config.help import ROOT
from utils.config.sweep import SweepJob, run_jobs
from utils.errors import UserError
from utils.io.files import output_errors, write_json
from utils.record.figures import show_evaluated
from utils.record.logging import environment_rank
from utils.record.run_folder import default_run_dir
from utils.record.run_reader import RunReader

_SHARES = (0.25, 0.5, 1.0)
_LEAST = 4  # images of a class on average, in the smallest run
_EXPONENTS = np.linspace(0.02, 3, 150)


def train_curve(config: ImageTrainingConfig, job: Job) -> str:
    """Train on each share, predict, and write plots/learning_curve.png and learning_curve.json; return their line."""
    path = default_run_dir(config.model_dump(mode="json"), job)
    given = config.loop.per_class
    limits = [max(1, round(share * given)) if isinstance(given, int) else share * (given or 1.0) for share in _SHARES]
    images = _count_images(config, limits)
    if config.dry_run:
        return f"{train(config, job)}; the curve: {', '.join(f'{count:,}' for count in images)} images"
    words = [word for word in job.overrides if word.partition("=")[0] not in ("curve", "run_dir")]
    jobs = []
    for share, most in zip(_SHARES, limits):
        folder, more = (path, []) if share == 1 else (path / f"curve_{100 * share:g}", [f"loop.per_class={most}"])
        jobs.append(SweepJob((*words, *more, f"run_dir={folder}"), str(folder)))
    if failed := max(run_jobs(iter(jobs), config.sweep, str(ROOT / f"{job.script}.py")).values()):
        raise SystemExit(failed)
    results = [RunReader(Path(each.folder)).result or {} for each in jobs]
    if any(result.get("value") is None for result in results):
        raise UserError(f"curve: a run in {path} has no best figure, so there is no curve; see its log.txt")
    curve = fit_curve(images, results)
    metric = results[-1]["metric"]
    if environment_rank() == 0:
        with output_errors("run_dir", path):
            _write(path, {"metric": metric, **curve}, results[-1]["is_lowest_best"])
    shown = ", ".join(f"{run['value']:.4g} with {run['images']:,}" for run in curve["runs"])
    twice = f"twice as many would give {curve['twice']['value']:.4g}"
    return f"learning curve: {show_evaluated(metric)} {shown} images; {twice}: {path}/plots"


def _write(path: Path, curve: Mapping[str, Any], is_error: bool) -> None:
    """Write learning_curve.json, and draw the curve."""
    from utils.record.plots import plot_learning_curve  # imports matplotlib

    write_json(path / "learning_curve.json", curve)
    points = [*curve["runs"], curve["twice"]]
    counts = np.array([point["images"] for point in points])
    values = np.array([point["value"] for point in points])
    a, b, c = curve["law"].values()
    title = f"{path.name}: {curve['metric']}"
    fitted = a + b * counts**-c
    plot_learning_curve(counts, _turn(values, is_error), fitted, title, path / "plots/learning_curve.png")


def _count_images(config: ImageTrainingConfig, limits: Sequence[int | float]) -> list[int]:
    """Return the number of training images of each run. Raises UserError if there is no curve."""
    loop = config.loop
    if loop.count is not None:
        raise UserError(f"curve: loop.count={loop.count} is not of each class; set loop.per_class")
    if loop.total_steps == 0:
        raise UserError("curve: trains three runs; remove loop.total_steps=0")
    kind = KINDS[config.task.name]
    collection = load_collection(config.data)
    if len(collection.rows("val")) == 0:
        raise UserError(f"curve: {collection.root} has no validation images; set data.validation_fraction")
    setup = kind.set_up(config, collection)
    is_usable, _ = kind.samples(collection, setup)
    runs = [training_rows(collection, loop.model_copy(update={"per_class": most}), is_usable) for most in limits]
    mean = len(runs[0]) / (np.count_nonzero(kind.count_classes(collection, setup, runs[0])) or 1)
    if mean < _LEAST:
        raise UserError(f"curve: {_SHARES[0]:.0%} of the labels are {mean:.2g} images of a class; {_LEAST} are needed")
    return [len(rows) for rows in runs]


def _turn(values: Any, is_error: bool) -> Any:
    """Return figures as errors, or errors as figures."""
    return values if is_error else 1 - values


def fit_curve(images: Sequence[int], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the runs, the law, and what twice the images would give, as JSON values. results: of RunReader."""
    runs = [{"images": count, "value": result["value"]} for count, result in zip(images, results)]
    is_error = results[-1]["is_lowest_best"]
    errors = _turn(np.array([run["value"] for run in runs]), is_error)
    a, b, c = fit_law(np.array(images), errors)
    most = 2 * images[-1]
    twice = {"images": most, "value": _turn(a + b * most**-c, is_error)}
    return {"runs": runs, "law": {"a": a, "b": b, "c": c}, "twice": twice}


def fit_law(images: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Return a, b and c of the law for errors, [N].

    For each exponent, a and b are a least-squares fit without negative values; the closest one is taken.
    """
    powers = (images / images[-1]) ** -_EXPONENTS[:, None]  # [C, N]
    fits = [nnls(np.stack([np.ones(len(images)), each], axis=1), errors) for each in powers]
    best = int(np.argmin([gap for _, gap in fits]))
    a, b = fits[best][0].tolist()
    c = float(_EXPONENTS[best])
    return a, b * float(images[-1]) ** c, c
