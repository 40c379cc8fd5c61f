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
        "numbers are per cent of the row's images; other: of classes that are not shown"
    )
    counts, names = confusion.matrix(classes), [class_names[index] for index in classes]
    elsewhere = samples[classes] - counts.sum(axis=1)
    return pictures.confusion_matrix(counts, samples[classes], names, title, percent=True, elsewhere=elsewhere)


def draw_mistakes(kept: Mapping[str, np.ndarray], confusion: Confusion, class_names: Sequence[str]) -> np.ndarray:
    """Draw the most confident mistakes, `kept` in that order."""
    total, count = int(confusion.samples.sum()), len(kept["sample_id"])
    title = (
        f"Mistakes, the most confident first: {count} of {total - int(confusion.correct.sum()):,} (images: {total:,})\n"
        "true → predicted (probability)"
    )
    return _draw_samples(kept, np.arange(count), class_names, title)


def draw_predictions(kept: Mapping[str, np.ndarray], total: int, class_names: Sequence[str]) -> np.ndarray:
    """Draw samples and their predictions, in the order of their rows."""
    title = (
        f"Predictions: {len(kept['sample_id'])} of {total:,} images, the same ones each time\n"
        "true → predicted (probability); blue right, red wrong"
    )
    return _draw_samples(kept, kept["sample_id"].argsort(), class_names, title)


def _draw_samples(
    kept: Mapping[str, np.ndarray], order: np.ndarray, class_names: Sequence[str], title: str
) -> np.ndarray:
    """Draw samples in an order; `kept` has images [N, C, H, W], labels, predicted and prob [N]."""
    captions = []
    for label, predicted, prob in zip(kept["labels"][order], kept["predicted"][order], kept["prob"][order]):
        color = pictures.RIGHT if label == predicted else pictures.WRONG
        true, given = (pictures.legible(class_names[index]) for index in (label, predicted))
        mark = "✓" if label == predicted else f"→ {pictures.shorten(given, 14)}"
        captions.append([(pictures.shorten(true, 20), color), (f"{mark} ({prob:.2f})", color)])
    return pictures.image_grid(_as_images(kept["images"])[order], captions, title)


def _as_images(images: np.ndarray) -> np.ndarray:
    """Return [N, C, H, W] images of bytes, or of floats from 0 to 1, as [N, H, W, C] bytes."""
    pixels = images if images.dtype == np.uint8 else (images * 255.0).round().clip(0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def draw_tag_mistakes(kept: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Draw the images of the greatest losses, and of each the worst tags.

    kept: images [N, C, H, W]; wrong, missed: [N, k] outputs of tags that were given wrongly and that were not given;
    wrong_prob, missed_prob: [N, k], the probability of the mistake, for a missed tag 1 - that of the tag.
    """
    captions = []
    for index in range(len(kept["images"])):
        wrong, missed = (
            [(pictures.legible(names[tag]), prob)
             for tag, prob in zip(kept[kind][index], kept[f"{kind}_prob"][index]) if prob > 0.5]
            for kind in ("wrong", "missed")
        )  # fmt: skip
        captions.append(
            [(f"+ {pictures.shorten(name, 22)} ({prob:.2f})", pictures.WRONG) for name, prob in wrong]
            + [(f"- {pictures.shorten(name, 22)} ({1 - prob:.2f})", pictures.RIGHT) for name, prob in missed]
        )
    title = "Greatest losses\n+ given wrongly, in red; - not given, in blue (probability of the tag)"
    return pictures.image_grid(_as_images(kept["images"]), captions, title, columns=4, tile_px=226)


def draw_reconstructions(original: np.ndarray, masked: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Draw rows of originals, masked inputs and reconstructions; each [N, H, W, C] uint8."""
    title = "From the top: originals, masked inputs, reconstructions"
    images = [*original, *masked, *painted]
    return pictures.image_grid(images, [()] * len(images), title, columns=len(original))


def draw_pr_curves(groups: Mapping[str, Group]) -> np.ndarray:
    """Draw the micro precision of groups of tags over their recall; a group that has all the positives is `all`."""
    from matplotlib.figure import Figure

    from utils.record import plots

    with plots.style():
        figure = Figure(figsize=(6.4, 6.0))
        axis = figure.add_subplot(
            title="Precision and recall, all decisions of a group together",
            xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01),
        )  # fmt: skip
        whole = groups.get("all")
        for name, group in groups.items():
            if not group.support or (whole is not None and group is not whole and group.support == whole.support):
                continue
            precision, recall, _ = group.micro()
            some = group.predicted > 0
            axis.plot(recall[some], precision[some], linewidth=1.8, label=f"{name} (positives: {group.support:,})")
        axis.legend()
        return plots.figure_to_image(figure)
