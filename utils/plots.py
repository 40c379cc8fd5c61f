"""Pictures by matplotlib and Pillow, written atomically, never on a display."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from utils.files import write_atomically
from utils.metrics_log import MetricsLog

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def save_image(path: Path, image: np.ndarray) -> None:
    """Write [H, W, 3] uint8 as PNG."""
    write_atomically(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write and close a figure."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)


def plot_curves(metrics: MetricsLog | None, path: Path) -> None:
    """Draw every figure of the run over its steps: training losses together, each evaluated figure on its own."""
    if metrics is None:
        return
    evaluated = [name for name in metrics.names("evaluate") if name != "epoch" and not name.startswith("ema/")]
    others = [name for name in evaluated if name not in ("loss", "samples")]
    figure, axes = plt.subplots(1, 1 + len(others), figsize=(5.2 * (1 + len(others)), 3.8), squeeze=False)
    axes = axes[0]
    for label, name, kind in (("training", "loss", "train"), ("validation", "loss", "evaluate"),
                              ("validation, average", "ema/loss", "evaluate")):  # fmt: skip
        steps, values = metrics.series(name, kind)
        if steps:
            axes[0].plot(steps, values, label=label, marker="." if kind == "evaluate" else None, linewidth=1.2)
    axes[0].set_ylabel("loss")
    for axis, name in zip(axes[1:], others):
        for label, full in (("weights", name), ("average", f"ema/{name}")):
            steps, values = metrics.series(full, "evaluate")
            if steps:
                axis.plot(steps, values, label=label, marker=".", linewidth=1.2)
        axis.set_ylabel(name)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    save_figure(figure, path)
