"""Pictures of an evaluation: confusion matrices and grids of predictions."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.measures.confusion import Confusion
from utils.record import pictures
from utils.record.figures import INK

_WHOLE_MATRIX = 40  # classes; a larger matrix is drawn in part
_PART_OF_MATRIX = 24  # the number of the most confused classes in that part


def draw_confusion(confusion: Confusion, class_names: Sequence[str]) -> np.ndarray:
    """Draw the confusion matrix in per cent of each true class, or that of the most confused of many classes.

    As scikit-learn draws it, whose import takes over a second.
    """
    from matplotlib.figure import Figure

    from utils.record.plots import figure_to_image, style

    samples = confusion.samples
    number = len(class_names)
    wrong = f"{int((samples - confusion.correct).sum()):,} of {int(samples.sum()):,}"
    is_whole = number <= _WHOLE_MATRIX
    classes = list(range(number)) if is_whole else confusion.most_confused(_PART_OF_MATRIX)
    counts = confusion.counts[classes][:, classes].toarray()
    shown = f"Confusion matrix of {number}" if is_whole else f"The {len(classes)} most confused of {number:,}"
    title = f"{shown} classes; images wrong in all: {wrong}\nnumbers are per cent of the row's images"
    percent = 100 * counts / np.maximum(samples[classes], 1)[:, None]
    columns = [pictures.shorten(pictures.legible(class_names[index]), 24) for index in classes]
    rows = [f"{name}  ({images:,})" for name, images in zip(columns, samples[classes])]
    side = 1 + 0.5 * len(classes)  # inches
    with style():
        figure = Figure(figsize=(side, side))
        axis = figure.add_subplot(title=title, xlabel="predicted", ylabel="true (images)")
        axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        axis.grid(False)
        axis.set_xticks(range(len(classes)), columns, rotation=90)
        axis.set_yticks(range(len(classes)), rows)
        for row, column in np.argwhere(counts):
            value = percent[row, column]
            color = "white" if value > 50 else INK
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
        return figure_to_image(figure)


def draw_predictions(samples: Mapping[str, np.ndarray], class_names: Sequence[str]) -> np.ndarray:
    """Draw mistakes. samples: images, uint8 [N, C, H, W], labels, predicted and prob [N]."""
    captions = []
    for label, predicted, prob in zip(samples["labels"], samples["predicted"], samples["prob"]):
        true, wrong = (pictures.legible(class_names[index]) for index in (label, predicted))
        lines = (pictures.shorten(true, 20), f"→ {pictures.shorten(wrong, 14)} ({prob:.2f})")
        captions.append([(line, pictures.WRONG) for line in lines])
    title = "Mistakes, the most confident first\ntrue → predicted (probability)"
    return pictures.image_grid(samples["images"].transpose(0, 2, 3, 1), captions, title)
