"""What a finished run says would improve it, from the tables of its last evaluation."""

import pytest

from engine.run.advice import advise


def ask(recalls, class_images, samples=100):
    """Return the advice of classes with so many samples each."""
    classes = [
        {"class": f"c{number}", "samples": samples, "correct": round(samples * recall), "recall": recall}
        for number, recall in enumerate(recalls)
    ]
    images = samples * len(recalls)
    right = sum(row["correct"] for row in classes)
    decisions = [{"predicted": images, "precision": right / max(1, images)}]
    return advise({"classes": classes, "decisions": decisions}, class_images)


def test_the_classes_with_most_errors():
    (errors,) = ask([0.9, 0.2, 0.8, 0.4, 0.6, 0.7], [90, 20, 80, 40, 60, 70])
    most = "c1 33% (accuracy 0.2, 20 images), c3 25% (accuracy 0.4, 40 images)"
    assert errors == f"most errors: {most}"


@pytest.mark.parametrize("counts", [(), (9,)], ids=["a task without classes", "another number of classes"])
def test_nothing_is_said_without_a_table_that_fits(counts):
    assert ask([0.5, 0.5], counts) == []


@pytest.mark.parametrize(
    ("recalls", "samples"),
    [([0.37, 0.37], 200), ([0.6, 0.5], 50), ([0.5, 1.0], 4), ([0.0, 0.0], 0)],
    ids=["top-1 of 0.37", "0.55 of 100 images may be 0.45", "two errors of 4 images", "no image"],
)
def test_what_may_be_chance_is_no_advice(recalls, samples):
    assert ask(recalls, (9, 9), samples) == []
