"""The map of a collection: where its images are, by what a network sees in them, and how ECharts draws them."""

import hashlib

import numpy as np

from utils.io.files import write_atomically
from utils.io.memo import OURS, own_cache
from viewer.parts import TEXT

MOST = 10_000  # images on a map
THUMBNAIL = """point => { const image = new Image(160); image.alt = ""
image.src = "/image/%s/%s/" + point.value[2] + "?px=256"; return image }"""
_HIDDEN = {"show": False, "scale": True}
CHART = {
    "animation": False, "xAxis": _HIDDEN, "yAxis": _HIDDEN, "brush": {"xAxisIndex": 0, "yAxisIndex": 0},
    "dataZoom": [{"type": "inside"}, {"type": "inside", "yAxisIndex": 0}],
    "toolbox": {"feature": {"brush": {"type": ["polygon", "clear"]}}},
}  # fmt: skip
LEGEND = {
    "dimension": 3, "top": 0, "orient": "horizontal", "textStyle": TEXT,
    "inRange": {"color": ["#440154", "#3b528b", "#21918c", "#5ec962", "#d9c80f"]},
}  # fmt: skip


def place_images(points: np.ndarray) -> np.ndarray:
    """Return the places of images on the map, float [N, 2], by t-SNE of their features; kept by these.

    points: features on their principal axes, float32 [N, C], the widest axis last. Few images are shown by two axes.
    """
    if len(points) <= 60:  # t-SNE looks at as many neighbours
        return points[:, -2:]
    file = own_cache(OURS / "maps") / hashlib.sha256(points).hexdigest()
    if not file.exists():
        from openTSNE import TSNE

        tsne = TSNE(perplexity=20, early_exaggeration_iter=100, n_iter=200, random_state=0)
        write_atomically(file, tsne.fit(points[:, -50:]).tofile)
    return np.fromfile(file).reshape(-1, 2)
