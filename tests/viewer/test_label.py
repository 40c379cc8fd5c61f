"""Labels from nothing: keys give labels, and the rest is proposed."""

import numpy as np
from PIL import Image

from tests.support import data_config
from utils.record.run_index import RunIndex
from viewer.images import Shelf
from viewer.label import Labelling


def test_labels_follow_keys_and_the_rest_is_proposed(tmp_path):
    for number in range(60):
        image = np.random.default_rng(number).integers(0, 256, (24, 24), np.uint8)
        image[12 * (number % 2) :][:12] //= 4
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    shelf = Shelf(RunIndex([]), data_config(root=str(tmp_path)))
    tab = Labelling(shelf, *shelf.configs, "", print)
    tab.state("", None, "0", "edited")
    tab.state("", None, "1", "edited")
    for _ in range(24):
        tab.press("12"[int(tab.questions[tab.here].path[1]) % 2])
    tab.follow()
    assert tab.progress().startswith("24 of 60 labelled; the others recognise")
