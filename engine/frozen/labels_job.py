"""job=labels: rank the labels and tags of a collection that all other images contradict."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from data.collection.collection import Collection
from data.config import DataConfig
from data.layouts.table import count_values
from data.load import load_collection
from data.tools.config import Labels
from data.tools.tool import save_report
from engine.config import MACHINE
from engine.frozen.choose import choose_frozen
from engine.frozen.features import read_features
from engine.frozen.growth import FEWEST, extrapolate
from engine.frozen.labels import bound_wrong, judge_classes, judge_tags
from engine.frozen.order import order_next, predict_classes
from engine.measures.neighbours import find_nearest
from engine.update.runtime import choose_runtime
from utils.errors import UserError
from utils.formats.spelling import RATING, parse_tag
from utils.io.files import output_errors, write_atomically, write_json
from utils.record.report import TableRow
from utils.record.run_reader import CONFIG_FILE
from utils.record.tables import LABELS

_LEAST_IMAGES = 2  # of a class: other images say nothing about the class of a single image
_LEAST_TAGGED = 5  # images of a tag
_MOST_CELLS = 2**24  # images times tags; above, only the most frequent tags are judged
_GUESSES = 3
_NEIGHBOURS = 6  # of an image in the table
_NEXT_IMAGES = 200  # to label next
_MOST_ROWS = 10_000  # of the table; the page shows as many

_Read = Callable[[np.ndarray], tuple[Tensor, np.ndarray]]


def rank_labels(job: Labels, data: DataConfig) -> str:
    """Write the tables and a page. Raises UserError (`data.root`, `job.weights`, `job.report`).

    The folder is `labels`. If the images have classes and tags, the tables of tags are in `tags`.
    """
    collection = load_collection(data)
    used = collection.weights() > 0
    counts = count_values(collection.table["label"].filter(pa.array(used)))
    ids = collection.class_ids([name for name, count in counts.items() if count >= _LEAST_IMAGES])
    rows = np.flatnonzero((ids >= 0) & used)
    tagged, tags, has = mark_tags(collection)
    judges = {}
    if ids[rows].any():
        judges[_judge_labels] = rows
    if len(tags):
        judges[partial(_judge_tags, tags, has)] = tagged
    if not judges:
        raise UserError(
            f"data.root: {str(collection.root)!r} has neither two classes of {_LEAST_IMAGES} images nor a tag on "
            f"{_LEAST_TAGGED}; give them, since other images judge a label"
        )
    runtime = choose_runtime(MACHINE)
    frozen = choose_frozen(job.weights, collection, runtime, "job.weights")
    read = partial(read_features, frozen, collection, data, runtime=runtime)
    about = {"root": str(Path(collection.root).resolve()), "says": frozen.says}
    lines = []
    for name, (judge, rows) in zip((job.name, "tags"), judges.items()):
        folder = Path(job.report) / name
        suspects = judge(collection, read, rows)
        with output_errors("job.report", folder):
            write_json(folder / CONFIG_FILE, {"script": "prepare", "data": data.model_dump(mode="json")})
            for file, table in suspects.files.items():
                write_atomically(folder / file, partial(pq.write_table, table.replace_schema_metadata(about)))
        tables = {"suspects": suspects.files[LABELS].to_pylist(), "growth": suspects.growth}
        page = save_report(folder, f"{collection.root}, by the features of {frozen.says}", suspects.figures, tables, {})
        lines.extend(f"{what}: {count:,}" for what, count in suspects.figures.items())
        view = shlex.join(["python", "view.py", f"runs={job.report}"])
        lines.append(f"{view} shows them under /review?run=0/{name}; {page}")
    return "; ".join(lines)


class _Suspects(NamedTuple):
    """Suspicious labels or tags. files: tables by file name."""

    files: dict[str, pa.Table]
    figures: dict[str, float]
    growth: Sequence[TableRow] = ()


def mark_tags(collection: Collection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows [N] of images with tags, the names of tags [T], and a mask of the tags of rows, bool [N, T].

    Images with unknown tags are skipped.
    """
    table = collection.table
    used = (collection.weights() > 0) & (pc.list_value_length(table["tags"]).to_numpy() > 0)
    if "unknown_tags" in table.column_names:
        used &= [not unknown for unknown in table["unknown_tags"].to_pylist()]
    rows = np.flatnonzero(used)
    texts = table["tags"].take(rows)
    parsed = {text: parse_tag(text) for text, count in count_values(texts).items() if count >= _LEAST_TAGGED}
    common = [text for text, tag in parsed.items() if tag.name and tag.category != RATING]
    places = {text: place for place, text in enumerate(common[: _MOST_CELLS // max(len(rows), 1)])}
    has = np.zeros((len(rows), len(places)), bool)
    for row, tags in enumerate(texts.to_pylist()):
        has[row, [places[text] for text in tags if text in places]] = True
    return rows, np.array([parsed[text].name for text in places]), has


def _judge_labels(collection: Collection, read: _Read, rows: np.ndarray) -> _Suspects:
    """Rank the labels of rows and the images without a label. Estimate how much more labels would help a classifier."""
    features, rows = read(rows)
    labels = np.array(collection.table["label"].take(rows).to_pylist())
    names, given = np.unique(labels, return_inverse=True)
    given = torch.from_numpy(given)
    right, probs = judge_classes(features, given)
    order = right.argsort(stable=True)[:_MOST_ROWS]
    best, guesses = probs[order].topk(min(_GUESSES, len(names)))
    columns = {
        "given": labels[order],
        "proposed": names[guesses[:, 0].numpy()],
        "guesses": names[guesses.numpy()].tolist(),
        "probabilities": best.tolist(),
    }
    files = {LABELS: _rank(columns, right[order], features, order, collection.table["path"].take(rows))}
    free = np.flatnonzero((collection.weights() > 0) & collection.table["label"].is_null().to_numpy())
    free = np.setdiff1d(free, collection.rows("test"))
    if len(free):
        more, free = read(free)
        both = torch.cat([features, more])
        both = F.normalize(both - both.mean(dim=0), dim=1)
        known = torch.arange(len(rows))
        chosen = order_next(both, known, predict_classes(both, known, given)[0], _NEXT_IMAGES)
        chosen = collection.table["path"].take(free[np.array(chosen) - len(rows)])
        files["tables/next.parquet"] = pa.table({"path": chosen, "rank": range(1, len(chosen) + 1)})
    growth = pa.table(extrapolate(features.double(), given)).to_pylist() if len(rows) >= FEWEST else []
    told = {f"accuracy with {row['images']:,} labels": round(row["accuracy"], 2) for row in growth}
    return _Suspects(files, {"labels": len(rows), **bound_wrong(probs[:, None], given[:, None]), **told}, growth)


def _judge_tags(names: np.ndarray, has: np.ndarray, collection: Collection, read: _Read, rows: np.ndarray) -> _Suspects:
    """Rank the missing and the superfluous tags of rows."""
    features, read_rows = read(rows)
    has = has[np.isin(rows, read_rows)]
    targets = torch.from_numpy(has)
    right, probs = judge_tags(features, targets)
    order = right.flatten().argsort(stable=True)[:_MOST_ROWS].numpy()
    images, tags = np.divmod(order, len(names))
    columns = {"tag": names[tags], "given": has[images, tags]}
    paths = collection.table["path"].take(read_rows)
    files = {LABELS: _rank(columns, right.flatten()[order], features, torch.from_numpy(images), paths)}
    return _Suspects(files, {"tags": int(has.sum()), **bound_wrong(probs, targets.long())})


def _rank(
    columns: Mapping[str, Sequence], right: Tensor, features: Tensor, images: Tensor, paths: pa.ChunkedArray
) -> pa.Table:
    """Return the table of labels of images, the most suspicious first, with the most similar images."""
    names = np.array(paths.to_pylist())
    near = find_nearest(features[images], features, min(_NEIGHBOURS + 1, len(features)))[1]
    neighbours = [names[rows[rows != image].numpy()].tolist() for rows, image in zip(near, images)]
    shared = {"path": names[images.numpy()], "probability": right.numpy(), "rank": range(1, len(images) + 1)}
    return pa.table({**shared, **columns, "neighbours": neighbours})
