"""Pictures of an evaluation: confusion matrices, grids of predictions, a tagger's curves."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.measures.confusion import Confusion
from engine.measures.tag_scores import Group
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


def draw_tag_mistakes(samples: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Draw the images with the highest losses and their worst tags.

    samples: images, uint8 [N, C, H, W]; wrong, missed: [N, k] indices of false positives and false negatives;
    wrong_prob, missed_prob: [N, k] probabilities of these mistakes.
    """
    captions = []
    for index in range(len(samples["images"])):
        lines = []
        for kind, sign, color in (("wrong", "+", pictures.WRONG), ("missed", "-", pictures.RIGHT)):
            for tag, prob in zip(samples[kind][index], samples[f"{kind}_prob"][index]):
                if prob > 0.5:
                    name = pictures.shorten(pictures.legible(names[tag]), 22)
                    lines.append((f"{sign} {name} ({prob if kind == 'wrong' else 1 - prob:.2f})", color))
        captions.append(lines)
    title = "Highest losses\n+ false positives, in red; - false negatives, in blue (probability of the tag)"
    return pictures.image_grid(samples["images"].transpose(0, 2, 3, 1), captions, title, columns=4, tile_px=226)


def draw_pr_curves(groups: Mapping[str, Group]) -> np.ndarray:
    """Draw the micro precision of each group of tags over its recall."""
    from matplotlib.figure import Figure

    from utils.record import plots

    with plots.style():
        figure = Figure(figsize=(6.4, 6.0))
        axis = figure.add_subplot(
            title="Micro precision and recall of each group",
            xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01),
        )  # fmt: skip
        for name, group in groups.items():
            if group.support:
                precision, recall, _ = group.micro()
                used = group.predicted > 0
                axis.plot(recall[used], precision[used], linewidth=1.8, label=f"{name} (positives: {group.support:,})")
        axis.legend()
        return plots.figure_to_image(figure)
