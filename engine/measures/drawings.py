"""Pictures of an evaluation: confusion matrices and grids of predictions."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.measures.confusion import Confusion
from utils.record import pictures

_WHOLE_MATRIX = 40  # classes; a larger matrix is drawn in part
_PART_OF_MATRIX = 24  # the number of the most confused classes in that part


def draw_confusion(confusion: Confusion, class_names: Sequence[str]) -> np.ndarray:
    """Draw the whole confusion matrix, or only the most confused of many classes."""
    samples = confusion.samples
    number = len(class_names)
    wrong = f"{int((samples - confusion.correct).sum()):,} of {int(samples.sum()):,}"
    is_whole = number <= _WHOLE_MATRIX
    classes = list(range(number)) if is_whole else confusion.most_confused(_PART_OF_MATRIX)
    counts = confusion.counts[classes][:, classes].toarray()
    names = [class_names[index] for index in classes]
    shown = f"Confusion matrix of {number}" if is_whole else f"The {len(classes)} most confused of {number:,}"
    title = f"{shown} classes; images wrong in all: {wrong}\nnumbers are per cent of the row's images"
    return pictures.confusion_matrix(counts, samples[classes], names, title)


def draw_predictions(samples: Mapping[str, np.ndarray], class_names: Sequence[str]) -> np.ndarray:
    """Draw mistakes. samples: images, uint8 [N, C, H, W], labels, predicted and prob [N]."""
    captions = []
    for label, predicted, prob in zip(samples["labels"], samples["predicted"], samples["prob"]):
        true, wrong = (pictures.legible(class_names[index]) for index in (label, predicted))
        lines = (pictures.shorten(true, 20), f"→ {pictures.shorten(wrong, 14)} ({prob:.2f})")
        captions.append([(line, pictures.WRONG) for line in lines])
    title = "Mistakes, the most confident first\ntrue → predicted (probability)"
    return pictures.image_grid(samples["images"].transpose(0, 2, 3, 1), captions, title)
