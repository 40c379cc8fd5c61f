"""A question about the figures of a run that needs features of a frozen network.

Questions that files and tables alone answer are in data/validity/. The answer is kept by the index of the collection
and the configuration that it depends on, so that a second start does not ask again.
"""

from contextlib import suppress
from time import monotonic

import numpy as np
import torch

from data.collection.collection import Collection
from data.validity.finding import Finding
from engine.config import TrainingConfig
from engine.update.runtime import Runtime
from utils.io.files import Json, ignore_write_errors, read_json, write_json
from utils.io.memo import OURS, files_key, own_cache
from utils.ranks import distributed
from utils.record.figures import show_figure

_ENOUGH = 100  # images: the interval of an accuracy is at most 0.2 wide


def judge_few(config: TrainingConfig, collection: Collection, runtime: Runtime) -> Finding | None:
    """If few images are for validation, cross-validate a ridge regression on features of a frozen network.

    One image of each group is judged by all others, in closed form.
    """
    rows = np.append(collection.rows("train"), collection.rows("val"))
    if config.task.name != "classification" or len(collection.rows("val")) >= _ENOUGH:
        return None
    from engine.frozen.choose import choose_frozen
    from engine.frozen.features import read_features
    from optim.linear import count_right

    ids = collection.class_ids(collection.class_names("train"))
    leads = np.unique(collection.leads(rows)[rows[ids[rows] >= 0]])
    frozen = choose_frozen(None, collection, runtime, "", "cached")
    leads = np.random.default_rng(0).permutation(leads)[:1000]  # as many as can be read in 5 s
    features, read = read_features(frozen, collection, config.data, leads, runtime, monotonic() + 5)
    right = count_right(features, torch.from_numpy(ids[read])) / len(read)
    line = (
        "few validation images; by cross-validation, a regression on frozen features has top-1 "
        f"{show_figure('top1', {'top1': right, 'samples': len(read)})}; evaluate.py folds=5 measures the training so"
    )
    return Finding(0.3, "folds", line, "few validation images")


_FOLDER = OURS / "findings"
_VERSION = 2  # increment it when the question changes


def list_findings(config: TrainingConfig, collection: Collection, runtime: Runtime) -> list[Json]:
    """Return all findings about a run, the most serious first: the fields of `Finding`. Rank 0 asks for all ranks."""
    asked = distributed.rank_zero_call(lambda: ask(config, collection, runtime))
    return [finding._asdict() for finding in sorted([*collection.findings, *asked], reverse=True)]


def ask(config: TrainingConfig, collection: Collection, runtime: Runtime) -> list[Finding]:
    """Return the finding of the question, if it has one; it is asked once."""
    stated = [config.task.model_dump(mode="json"), config.data.model_dump(mode="json"), config.init_from]
    file = own_cache(_FOLDER) / f"{files_key([collection.arrow], _VERSION, *stated)}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Finding(*values) for values in read_json(file)]
    findings = [*filter(None, [judge_few(config, collection, runtime)])]
    with ignore_write_errors(file):
        write_json(file, findings)
    return findings
