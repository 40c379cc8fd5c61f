"""The curves of a run, at every age."""

import numpy as np
import pytest
from PIL import Image

from utils.record.metrics_log import MetricsLog
from utils.record.plots import plot_curves


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
    return metrics.rows


@pytest.mark.parametrize("rows, evaluations, ema", [(1, 0, False), (0, 1, False), (3, 1, True), (4000, 40, True)])
def test_a_picture_at_every_age(rows, evaluations, ema, tmp_path):
    plot_curves(fill(tmp_path, rows, evaluations, ema), tmp_path / "curves.png", "$MODEL_$SEED")  # no mathematics
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 500 and len(np.unique(np.asarray(image.convert("L")))) > 20
