"""What evaluation says of a classifier: literal tables, equality with scikit-learn, names of every script, files."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import nn

from engine.measures.confusion import ConfusionCounts
from engine.tasks.classification import ClassificationTask
from engine.tasks.kind import Setup
from tests.engine.test_tasks import CLASSIFY, MODEL
from tests.in_process import TINY, run
from tests.support import make_collection, read_table
from utils.record.report import write_table

GREY = MODEL.model_copy(update={"in_channels": 1})


class Lookup(nn.Module):
    """A network without arithmetic: the first pixel names the row of logits, so ranks and batches agree bit for bit."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images):
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def make_task(logits, names):
    preprocessing = {"image_size_hw": [8, 8], "mean": [0.0], "std": [1.0]}
    task = ClassificationTask(Setup(GREY, CLASSIFY, preprocessing, {"class_names": names}))
    task.network = Lookup(logits)
    return task.eval()


def make_batch(ids, labels, weight=None):
    """Return a batch whose images hold their sample_id (below 256); keys are any fixed order."""
    ids = torch.as_tensor(ids)
    return {
        "sample_id": ids,
        "key": (ids * 7919 + 13) % 1009,
        "weight": torch.ones(len(ids)) if weight is None else torch.as_tensor(weight),
        "images": ids.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).clone(),
        "labels": torch.as_tensor(labels),
    }


def confusion_of(labels, predicted, classes):
    labels, predicted = torch.as_tensor(labels), torch.as_tensor(predicted)
    counts = ConfusionCounts(classes)
    counts.add(labels, predicted, torch.ones(len(labels), dtype=torch.bool))
    return counts.reduce()


def test_a_literal_table():
    found = confusion_of([0, 0, 0, 0, 1, 1, 3], [0, 1, 1, 2, 1, 0, 3], 4)
    assert [row["confused_with"] for row in found.class_rows("abcd")] == ["b", "a", None, None]
    assert found.class_rows("abcd")[2] == {
        "class": "c", "samples": 0, "predicted": 1, "correct": 0, "recall": None, "precision": 0.0, "f1": None,
        "confused_with": None, "confused_count": None,
    }  # fmt: skip
    assert found.pair_rows("abcd", 2) == [
        {"true": "a", "predicted": "b", "count": 2, "share": 0.5},
        {"true": "a", "predicted": "c", "count": 1, "share": 0.25},
    ]
    assert found.counts.toarray()[:2, :2].tolist() == [[1, 2], [1, 1]]
    assert found.most_confused(4) == [0, 1, 2] and found.most_confused(2) == [0, 1]


@pytest.mark.parametrize("classes, samples", [(2, 50), (300, 500)])
def test_figures_equal_those_of_scikit_learn(classes, samples):
    """300 classes of 500 samples: many have none, and many are never predicted."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (samples,), generator=generator)
    guesses = torch.randint(classes, (samples,), generator=generator)
    predicted = torch.where(torch.rand(samples, generator=generator) < 0.5, labels, guesses)
    found = confusion_of(labels, predicted, classes)
    every, held = range(classes), np.unique(labels)

    assert (found.counts.toarray() == reference.confusion_matrix(labels, predicted, labels=every)).all()
    expected = reference.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=np.nan)
    rows = found.class_rows([str(number) for number in every])
    for name, column in zip(("precision", "recall", "f1", "samples"), expected):
        own = np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=float)
        # A class without a right prediction has an F1 of 0 here.
        places = held if name == "f1" else every
        np.testing.assert_allclose(own[places], np.nan_to_num(column)[held] if name == "f1" else column, rtol=1e-12)
    means = {"macro_f1": np.nan_to_num(expected[2][held]).mean(), "mean_class_accuracy": expected[1][held].mean()}
    assert found.macro_scalars() == pytest.approx({**means, "always_one_class": expected[3].max() / samples})


def test_top_k_equals_that_of_scikit_learn():
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 12
    scalars = make_task(logits, [f"c{number}" for number in range(12)]).evaluate(
        {"val": [make_batch(range(start, start + 40), labels[start : start + 40]) for start in range(0, 200, 40)]}, 0
    ).scalars  # fmt: skip
    for name, k in {"top1": 1, "top5": 5}.items():
        assert scalars[name] == pytest.approx(reference.top_k_accuracy_score(labels, logits.numpy(), k=k))
    assert scalars["loss"] == pytest.approx(reference.log_loss(labels, logits.softmax(1).numpy()), rel=1e-5)


@pytest.mark.parametrize(
    "names, labels, right",
    [
        (["猫", "собака", "قطة"], [0, 2, 2], False),  # none of the second
        (["a name\nof two lines", "x" * 500, "U+0041", "U+0301"], [0, 1, 2], False),
        ([f"c{number}" for number in range(41)], [0, 1, 40], True),
    ],
    ids=["scripts, one class without a sample", "odd names", "more than a whole matrix"],
)
def test_edges_are_drawn(names, labels, right):
    logits = torch.full((3, len(names)), -5.0)
    logits[range(3), [label if right else (label + 1) % len(names) for label in labels]] = 5.0
    report = make_task(logits, names).evaluate({"val": [make_batch(range(3), labels)]}, 0)
    most = min(5, len(names) - 1)
    expected = {"loss", "top1", f"top{most}", "mean_class_accuracy", "macro_f1", "samples", "always_one_class"}
    assert set(report.scalars) == expected
    assert report.scalars["macro_f1"] == report.scalars["top1"] == float(right)
    assert len(report.tables["classes"]) == len(names) and bool(report.tables["confusions"]) != right
    for image in report.draw().values():
        assert image.dtype == np.uint8 and image.shape[2] == 3 and min(image.shape[:2]) > 60
        assert max(image.shape[:2]) < 2500, "a long name widens the picture"


def test_a_table_is_written_and_an_empty_one_leaves_no_older_one(tmp_path):
    path = tmp_path / "tables/x.csv"
    write_table(path, [{"class": 'a, "b"', "f1": None}, {"class": "猫", "f1": 0.5}])
    assert read_table(path) == [{"class": 'a, "b"', "f1": ""}, {"class": "猫", "f1": "0.5"}]
    write_table(path, [])
    write_table(path, [])
    assert not path.exists()


def test_decisions_at_each_threshold():
    probs = torch.tensor([0.92, 0.555, 0.8, 0.6, 0.7])
    logits = torch.stack([probs, 1 - probs], dim=1).log()
    batches = [make_batch([0, 1, 2], [0, 0, 1]), make_batch([3, 4], [0, 0], weight=[1.0, 0.0])]
    rows = make_task(logits, ["a", "b"]).evaluate({"val": batches}, 0).tables["decisions"]
    found = [(rows[level]["predicted"], rows[level]["correct"]) for level in (0, 55, 57, 70, 91, 94)]
    assert found == [(4, 3), (4, 3), (3, 2), (2, 1), (1, 1), (0, 0)] and rows[70]["threshold"] == pytest.approx(
        0.7, abs=0.005
    )
    assert len(rows) == 100 and all(row["positives"] == 4 for row in rows)


def test_training_and_evaluate_write_the_same_tables(tmp_path):
    data = make_collection(tmp_path / "images", per_class=4, validation=3)
    one_channel = ["model.in_channels=1", "augment.mean=[0.5]", "augment.std=[0.5]"]
    run("finetune", [*TINY, *one_channel, f"data.root={data}", "run_dir=run"], tmp_path)
    run("evaluate", ["run_dir=run", "weights=last", "runtime.threads=1", "runtime.precision=fp32"], tmp_path)
    for name in ("classes", "confusions", "decisions"):
        files = [tmp_path / f"run/tables/{prefix}{name}.csv" for prefix in ("", "evaluate_last_")]
        assert files[0].read_text() == files[1].read_text()
    for name in ("confusion", "mistakes"):
        assert all((tmp_path / f"run/plots/{prefix}{name}.png").exists() for prefix in ("", "evaluate_last_"))
