"""What names the class of an image beside what the image shows: pictures of its group, or facts of its file."""

import numpy as np
from numpy import ndarray

from data.images.measure import FileFacts
from data.validity.finding import Finding

_MARK = "perhaps by facts of files"
DETAIL = Finding(0.3, "augment.image_size_hw", "the octave of fine detail alone tells the class")
_FACTS = {
    "size_and_format": Finding(0.8, "data.root", "size and format alone tell the class", _MARK),
    "format": Finding(0.8, "data.root", "the format alone tells the class", _MARK),
    "camera_and_year": Finding(0.8, "data.root", "camera and year alone tell the class", _MARK),
    "border": Finding(
        0.5, "data.root", "the border alone, perhaps bars or a watermark, tells the class"
    ),  # or the night
    "fine_detail": DETAIL,
}
_SHOWN = 3  # classes


def name_nearest(pictures: ndarray, labels: ndarray, groups: ndarray) -> float:
    """Return how often the most similar picture [N, D] of another group [N] has the same label [N]."""
    points = pictures.astype(np.float64)
    distances = np.square(points).sum(axis=1) - 2 * points @ points.T  # squared, less a constant of each row
    distances[groups[:, None] == groups] = np.inf
    return (labels[distances.argmin(axis=1)] == labels).mean()


def find_shortcuts(facts: list[FileFacts], labels: ndarray) -> list[Finding]:
    """Name a fact of files that tells most of the labels [N], texts or "", by the other images with the same value."""
    names, ids = np.unique(labels, return_inverse=True)
    given = np.eye(len(names))[ids] * (labels != "")[:, None]
    for fact, finding in _FACTS.items():
        values = [str(getattr(each, fact)) for each in facts]
        votes = (np.array(values)[:, None] == values) @ given - given
        told = given[votes.argmax(axis=1) == ids].sum()
        if told > (given.sum() + given.sum(axis=0).max()) / 2:  # half of the errors are gone
            pairs = [": ".join(pair) for pair in dict(zip(labels.tolist(), values)).items() if pair[0]]
            shown = "; ".join(pairs[:_SHOWN])
            return [finding._replace(line=f"{finding.line} of {told / given.sum():.0%} of the images: {shown}")]
    return []
