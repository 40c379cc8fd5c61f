"""job=labels: the labels of a collection that are probably wrong, by what all other images say of each."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data.config import DataConfig
from data.layouts.table import count_values
from data.open import load_collection
from data.tools.tool import Tool, save_report
from engine.frozen.choose import MACHINE, choose_frozen
from engine.frozen.features import read_features
from engine.frozen.growth import FEWEST, extrapolate
from engine.frozen.labels import judge_classes
from engine.frozen.order import order_next
from engine.measures.neighbours import find_nearest
from engine.update.runtime import choose_runtime
from utils.config.schema import PathText
from utils.errors import UserError
from utils.io.files import output_errors, write_atomically, write_json
from utils.record.report import TableRow
from utils.record.run_reader import CONFIG_FILE
from utils.record.tables import LABELS

_LEAST = 2  # images of a class: the others say nothing of what one alone has
_GUESSES = 3
_NEAREST = 6  # images around one, itself left out
_NEXT = 200  # images to label next
_MOST = 10_000  # rows of the table, as many as the page shows


class Labels(Tool):
    """Rank the labels by how probably they are wrong, and the images without a label by how much one would tell.

    weights: a run or a file whose features tell; null: a network that has not seen the labels.
    """

    name: Literal["labels"]
    report: PathText
    weights: PathText | None

    def run(self, data: DataConfig) -> str:
        """Write the tables and a page. Raises UserError (`data.root`, `job.weights`, `job.report`)."""
        collection = load_collection(data)
        used = collection.weights() > 0
        counts = count_values(collection.table["label"].filter(pa.array(used)))
        ids = collection.class_ids([name for name, count in counts.items() if count >= _LEAST])
        rows = np.flatnonzero((ids >= 0) & used)
        if not ids[rows].any():
            raise UserError(
                f"data.root: {str(collection.root)!r} has no two classes of {_LEAST} images; give them, since other "
                "images judge a label"
            )
        runtime = choose_runtime(MACHINE)
        frozen = choose_frozen(self.weights, collection, runtime, "job.weights")
        features, rows = read_features(frozen, collection, data, rows, runtime)
        paths, labels = (np.array(collection.table[name].take(rows).to_pylist()) for name in ("path", "label"))
        names, given = np.unique(labels, return_inverse=True)
        right, probs = judge_classes(features, torch.from_numpy(given))
        order = right.argsort(stable=True)[:_MOST]
        near = find_nearest(features[order], features, min(_NEAREST + 1, len(rows)))[1]
        best, guesses = probs[order].topk(min(_GUESSES, len(names)))
        columns = {"path": paths[order], "given": labels[order], "proposed": names[guesses[:, 0].numpy()]}
        columns |= {"probability": right[order].numpy(), "rank": range(1, len(order) + 1)}
        columns |= {"guesses": names[guesses.numpy()].tolist(), "probabilities": best.tolist()}
        others = [each[each != row].numpy() for each, row in zip(near, order)]
        columns["neighbours"] = [paths[each].tolist() for each in others]
        about = {"root": str(Path(collection.root).resolve()), "says": frozen.says}
        table = pa.table(columns, metadata=about)
        folder = Path(self.report) / self.name
        with output_errors("job.report", folder):
            write_atomically(folder / LABELS, partial(pq.write_table, table))
            write_json(folder / CONFIG_FILE, {"script": "prepare", "data": data.model_dump(mode="json")})
        wrong = round((1 - right).sum().item())
        title = f"{collection.root}, by the features of {frozen.says}"
        figures = {"labels": len(rows), "probably wrong": wrong}
        unlabelled = np.flatnonzero(used & collection.table["label"].is_null().to_numpy())
        unlabelled = np.setdiff1d(unlabelled, collection.rows("test"))
        if len(unlabelled):
            more, unlabelled = read_features(frozen, collection, data, unlabelled, runtime)
            chosen = order_next(torch.cat([features, more]), torch.arange(len(rows)), torch.from_numpy(given), _NEXT)
            chosen = collection.table["path"].take(unlabelled[np.array(chosen) - len(rows)])
            ranked = pa.table({"path": chosen, "rank": range(1, len(chosen) + 1)})
            with output_errors("job.report", folder):
                write_atomically(folder / "tables/next.parquet", partial(pq.write_table, ranked))
        tables = {"suspects": table.to_pylist()}
        further = ""
        if len(rows) >= FEWEST:
            tables["growth"] = pa.table(extrapolate(features.double(), torch.from_numpy(given))).to_pylist()
            further = _describe(tables["growth"])
        page = save_report(folder, title, figures, tables, {})
        suspects = f"about {wrong:,} of {len(rows):,} labels are probably wrong; {folder / LABELS} ranks them"
        return f"{suspects}{further}; {page}"


def _describe(growth: Sequence[TableRow]) -> str:
    """Return what twice as many labels promise, as the end of a sentence."""
    now, twice = growth
    interval = f"{twice['low']:.2f} to {twice['high']:.2f}"
    return (
        f"; a linear classifier has {now['accuracy']:.2f}, with twice the labels {twice['accuracy']:.2f} ({interval})"
    )
