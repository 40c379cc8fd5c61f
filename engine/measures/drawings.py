"""Pictures of an evaluation: confusion matrices, grids of predictions, reconstructions, curves of a tagger."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.measures.confusion import Confusion
from engine.measures.tag_scores import Group
from utils.record import pictures

_WHOLE_MATRIX = 40  # up to this number of classes all are drawn
_PART_OF_MATRIX = 24  # of more classes, the most confused ones


def draw_confusion(confusion: Confusion, class_names: Sequence[str]) -> np.ndarray:
    """Draw the whole confusion matrix of few classes, or that of the most confused of many."""
    samples = confusion.samples
    wrong, total = int((samples - confusion.correct).sum()), int(samples.sum())
    if len(class_names) <= _WHOLE_MATRIX:
        title = (
            f"Confusion matrix of {len(class_names)} classes; images wrong: {wrong:,} of {total:,}\n"
            "numbers are images, the shade is the share of the row"
        )
        counts = confusion.matrix(range(len(class_names)))
        return pictures.confusion_matrix(counts, samples, class_names, title)
    classes = confusion.most_confused(_PART_OF_MATRIX)
    title = (
        f"The {len(classes)} most confused of {len(class_names):,} classes; "
        f"images wrong in all: {wrong:,} of {total:,}\n"
        "numbers are per cent of the row's images; other: classes that are not shown"
    )
    counts, names = confusion.matrix(classes), [class_names[index] for index in classes]
    elsewhere = samples[classes] - counts.sum(axis=1)
    return pictures.confusion_matrix(counts, samples[classes], names, title, percent=True, elsewhere=elsewhere)


def draw_mistakes(kept: Mapping[str, np.ndarray], confusion: Confusion, class_names: Sequence[str]) -> np.ndarray:
    """Draw the most confident mistakes, `kept` in that order."""
    total = int(confusion.samples.sum())
    wrong = total - int(confusion.correct.sum())
    shown = _predictions(kept, np.arange(len(kept["sample_id"])), class_names)
    title = f"Mistakes, the most confident first: {len(shown)} of {wrong:,} (images: {total:,})"
    return pictures.prediction_grid(shown, f"{title}\ntrue → predicted (probability)")


def draw_predictions(kept: Mapping[str, np.ndarray], total: int, class_names: Sequence[str]) -> np.ndarray:
    """Draw samples and their predictions, in the order of their rows."""
    shown = _predictions(kept, kept["sample_id"].argsort(), class_names)
    title = f"Predictions: {len(shown)} of {total:,} images, the same ones each time"
    return pictures.prediction_grid(shown, f"{title}\ntrue → predicted (probability); blue right, red wrong")


def _predictions(
    kept: Mapping[str, np.ndarray], order: np.ndarray, class_names: Sequence[str]
) -> list[pictures.Prediction]:
    """Return samples in an order; `kept` has images [N, C, H, W], labels, predicted and prob [N]."""
    images = _as_bytes(kept["images"])
    return [
        pictures.Prediction(
            images[index].transpose(1, 2, 0),
            class_names[kept["labels"][index]],
            class_names[kept["predicted"][index]],
            float(kept["prob"][index]),
        )
        for index in order
    ]


def _as_bytes(images: np.ndarray) -> np.ndarray:
    """Return images of bytes, or of floats from 0 to 1, as bytes."""
    return images if images.dtype == np.uint8 else (images * 255.0).round().clip(0, 255).astype(np.uint8)


def draw_tag_mistakes(kept: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Draw the images of the greatest losses, and of each the worst tags.

    kept: images [N, C, H, W]; wrong, missed: [N, k] outputs of tags that were given wrongly and that were not given;
    wrong_prob, missed_prob: [N, k], the probability of the mistake, for a missed tag 1 - that of the tag.
    """
    captions = []
    for index in range(len(kept["images"])):
        wrong, missed = (
            [(names[tag], prob) for tag, prob in zip(kept[kind][index], kept[f"{kind}_prob"][index]) if prob > 0.5]
            for kind in ("wrong", "missed")
        )
        captions.append([(f"+ {name} ({prob:.2f})", False) for name, prob in wrong]
                        + [(f"- {name} ({1 - prob:.2f})", True) for name, prob in missed])  # fmt: skip
    images = [image.transpose(1, 2, 0) for image in _as_bytes(kept["images"])]
    title = "Greatest losses\n+ given wrongly, in red; - not given, in blue (probability of the tag)"
    return pictures.caption_grid(images, captions, title)


def draw_reconstructions(original: np.ndarray, masked: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Draw rows of originals, masked inputs and reconstructions; each [N, H, W, C], range 0 to 1."""
    return pictures.image_rows([original, masked, painted], ["original", "masked input", "reconstruction"])


def draw_pr_curves(groups: Mapping[str, Group]) -> np.ndarray:
    """Draw the micro precision of groups of tags over their recall; a group that has all the positives is `all`."""
    from utils.record import plots  # matplotlib

    figure, axis = plots.open_square("Precision and recall, all decisions of a group together", "recall", "precision")
    whole = groups.get("all")
    for name, group in groups.items():
        if not group.support or (whole is not None and group is not whole and group.support == whole.support):
            continue
        precision, recall, _ = group.micro()
        some = group.predicted > 0
        axis.plot(recall[some], precision[some], linewidth=1.8, label=f"{name} (positives: {group.support:,})")
    axis.legend(frameon=False, fontsize=9.5)
    return plots.figure_to_image(figure)
