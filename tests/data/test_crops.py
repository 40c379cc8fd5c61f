"""Crops. Properties: parts of made pictures are found, mirrored or with bars too, and other pictures are not;
`prepare.py job=duplicates deduplicate.match=crop` lists them. docs/care.md has the figures of photographs.
"""

import numpy as np
import pytest
from PIL import ImageOps

from bench.crops import crop
from data.crops import _correlate, find_crops
from data.duplicates import group_duplicates, shrink_to_grey
from tests.data.care.test_reports import FOLDER, listed
from tests.data.test_duplicates import picture
from tests.in_process import run

PICTURES = [picture(seed, (240, 200)) for seed in range(60)]


def thumbnails(images):
    return np.stack([shrink_to_grey(np.asarray(image)) for image in images])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("share", "recall"), [(0.95, 0.95), (0.9, 0.95), (0.8, 0.9)])
def test_parts_are_found_and_nothing_else(share, recall, mirror):
    generator = np.random.default_rng(7)
    parts = [crop(image, share, generator, mirror) for image in PICTURES]
    wholes, found = find_crops(thumbnails([*PICTURES, *parts]))
    assert (wholes % 60 == found % 60).all()
    assert len({*found[found >= 60].tolist()}) >= recall * 60


def test_bars_are_cut_off():
    barred = [ImageOps.pad(image, (240, 240), color="black") for image in PICTURES]
    wholes, parts = find_crops(thumbnails([*PICTURES, *barred]))
    assert (wholes % 60 == parts % 60).all() and len({*wholes[wholes >= 60].tolist()}) >= 57


def test_plain_images_and_none_have_no_crops():
    ramp = np.linspace(100, 110, 32).astype(np.uint8)
    for levels in (np.zeros((0, 32, 32), np.uint8), np.stack([ramp[:, None] + ramp] * 2)):
        assert [len(rows) for rows in find_crops(levels)] == [0, 0]


def test_candidates_of_which_none_passes_the_first_stage():
    levels = np.empty((0, 32, 32), np.uint8)
    assert _correlate(levels, levels, np.empty(0, np.int64), steps=4).shape == (0,)


def test_a_group_joins_pairs_that_are_alike_whatever_their_hashes():
    hashes = np.array([2**40 - 1, 0, 2**62 - 1, 0])
    assert group_duplicates(hashes, [(np.array([0]), np.array([3]))]).tolist() == [0, 0, 2**62 - 1, 0]


def test_prepare_lists_crops(tmp_path):
    (tmp_path / "images").mkdir()
    for number, image in enumerate(PICTURES[:3]):
        image.save(tmp_path / f"images/{number}.png")
    crop(PICTURES[1], 0.85, np.random.default_rng(3), mirror=True).save(tmp_path / "images/part.jpg")
    run("prepare", ["job=duplicates", *FOLDER], tmp_path)
    assert listed(tmp_path, "duplicates") == {}
    run("prepare", ["job=duplicates", *FOLDER, "deduplicate.match=crop"], tmp_path)
    found = listed(tmp_path, "duplicates")
    assert len(found) == 1 and {*found} <= {"1.png", "part.jpg"}
