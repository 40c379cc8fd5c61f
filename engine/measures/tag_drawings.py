"""Pictures of a tagger's evaluation: curves of precision over recall, and the images with the highest losses."""

from collections.abc import Mapping, Sequence

import numpy as np

from engine.measures.tag_scores import Group
from utils.record import pictures


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
