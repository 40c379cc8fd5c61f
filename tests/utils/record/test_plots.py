"""The curves of a run, at every age."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.in_process import TINY, make_images, run
from utils.record.metrics_log import MetricsLog
from utils.record.plots import is_steep, plot_curves


def test_only_what_falls_far_gets_a_logarithmic_axis():
    for values, steep in [
        ([600.0, 5.0, 4.0], True), ([5.0, 1.0], False), ([0.02, 0.3, 0.7], False), ([9.0, 0.0], False), ([1.0], False),
    ]:  # fmt: skip
        axis = Figure().add_subplot()
        axis.plot(range(len(values)), values)
        assert is_steep(axis) is steep


def fill(folder, rows, evaluations, ema):
    metrics = MetricsLog(folder, 0)
    for number in range(1, rows + 1):
        figures = {"epoch": number / 10, "loss": 5.0 / number, "accuracy": 0.5, "lr": 1e-3, "images_per_sec": 100.0,
                   "skipped_steps": 0.0}  # fmt: skip
        metrics.add(20 * number, "train", figures | {"grad_norm": float("nan") if number == 2 else 1.0})
    for number in range(1, evaluations + 1):
        figures = {"epoch": number / 2, "loss": 4.0 / number, "top1": number / 50, "samples": 10.0}
        metrics.add(100 * number, "evaluate", figures | ({"ema/loss": 0.5, "ema/top1": 0.5} if ema else {}))
    metrics.close()
    return metrics


@pytest.mark.parametrize("rows, evaluations, ema", [(1, 0, False), (0, 1, False), (3, 1, True), (4000, 40, True)])
def test_a_picture_at_every_age(rows, evaluations, ema, tmp_path):
    plot_curves(fill(tmp_path, rows, evaluations, ema), tmp_path / "curves.png", "$MODEL_$SEED")  # no mathematics
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 500 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_the_loss_of_training_is_named_as_what_it_is(tmp_path, monkeypatch):
    """It has label smoothing and the like, which the validation loss has not; the names fit beside the title."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *more, **how: kept.append(figure) or save(figure, *more, **how)
    )
    plot_curves(fill(tmp_path, 9, 2, True), tmp_path / "curves.png", "run")
    panels = {axis.get_title(loc="left"): axis for axis in kept[0].axes}
    loss = panels["loss"]
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["as optimised 0.5556", "validation 2", "average 0.5"]
    assert list(panels) == ["loss", "top-1", "grad norm", "learning rate", "images per second"]  # accuracy is in top-1
    assert [line.get_label() for line in panels["top-1"].lines][:2] == ["training 0.5", "validation 0.04"]
    labels = [label.get_text() for label in loss.get_xticklabels()]
    assert {"0\n0", "0.2\n40", "1\n200"} <= set(labels)
    drawn = [(line.get_xdata() * 200, line.get_ydata()) for line in loss.lines]
    steps = np.arange(20, 181, 20)
    for (x, y), wanted in zip(drawn, [(steps, 100 / steps), ([100, 200], [4.0, 2.0]), ([100, 200], [0.5, 0.5])]):
        np.testing.assert_allclose([x, y], wanted)
    assert loss.get_legend().get_window_extent().x0 > loss._left_title.get_window_extent().x1


def test_without_a_row_there_is_no_picture(tmp_path):
    metrics = fill(tmp_path, 0, 0, False)
    plot_curves(metrics, tmp_path / "curves.png", "run")
    metrics.rows.append({"step": 10, "kind": "epoch", "epoch": 1})  # the first log is due later
    plot_curves(metrics, tmp_path / "curves.png", "run")
    assert not (tmp_path / "curves.png").exists()


def test_curves_are_redrawn_between_evaluations(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "utils.record.plots.plot_curves", lambda metrics, path, title: drawn.append((len(metrics.rows), title))
    )
    images = make_images(tmp_path / "images")
    often = ["loop.total_steps=5", "loop.plot_every_steps=2", "loop.evaluate_every_epochs=100", "run_dir=run"]
    run("finetune", [*TINY, f"data.root={images}", *often], tmp_path)
    assert drawn == [(2, "run"), (5, "run"), (8, "run")]  # epochs' rows too, and the evaluation at the end
