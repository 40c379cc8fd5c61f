"""What a finished run says would improve it, from the tables of its last evaluation and its metrics."""

from pathlib import Path

import pytest

from engine.run.advice import advise


def ask(recalls, class_images, curve=(0.5, 0.5), training=0.5):
    classes = [
        {"class": f"c{number}", "samples": 100, "correct": round(100 * recall), "recall": recall}
        for number, recall in enumerate(recalls)
    ]
    decisions = [
        {"threshold": share / 100, "predicted": 60 - share // 2, "correct": 50 - share // 2} for share in range(100)
    ]
    figures = [{"step": step, "kind": "evaluate", "top1": value} for step, value in enumerate(curve)]
    figures.append({"step": 2, "kind": "epoch", "train/accuracy": training})
    tables = {"classes": classes, "decisions": decisions}
    images = 100 * len(recalls)
    return advise(Path("run"), tables, figures, metric="top1", images=images, class_images=class_images)


def test_the_classes_with_most_errors_and_labels_to_check():
    found, lines = ask([0.9, 0.2, 0.8, 0.4, 0.6, 0.7], [90, 20, 80, 40, 60, 70])
    assert [row["class"] for row in found["most_errors"]] == ["c1", "c3", "c4"]
    assert found["most_errors"][0] == {
        "class": "c1", "share_of_errors": pytest.approx(80 / 240), "training_images": 20, "accuracy": 0.2,
    }  # fmt: skip
    assert (found["sure"], found["labels_to_check"]) == (35, 10)  # the right ones have 0.5 on average
    assert len(lines) == 3 and "c1 33% (accuracy 0.2, 20 images), c3" in lines[0]
    assert "evaluate.py run_dir=run" in lines[1]


@pytest.mark.parametrize(
    "curve, training, word",
    [((0.4, 0.5), 0.9, "more images"), ((0.4, 0.5), 0.5, "longer run"), ((0.49, 0.5), 0.5, "larger network")],
)
def test_longer_or_larger(curve, training, word):
    assert word in ask([0.5] * 4, [9] * 4, curve, training)[1][-1]


@pytest.mark.parametrize("counts", [(), (9,)], ids=["a task without classes", "another number of classes"])
def test_nothing_is_said_without_a_table_that_fits(counts):
    assert ask([0.5, 0.5], counts) == ({}, [])
