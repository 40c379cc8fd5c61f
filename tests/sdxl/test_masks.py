"""Masks: each follows its image through resize, mirror and crop, is kept by content, and must fit its image."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from data.images.bytes import Images
from data.images.decode import Decoder
from data.stream.order import Draw
from data.stream.source import IMAGE, UnreadableImage
from sdxl.caches.buckets import fitted_views, make_buckets
from sdxl.caches.masks import Masked, find_masks
from tests.data.collection.test_collection import load
from tests.sdxl.test_latent_cache import CONFIG
from tests.support import refuses

SIZE_HW = (90, 70)
RANDOM = CONFIG.model_copy(update={"crop": "random", "flip": 0.5})


def write(folder, source, count=3):
    """Write images of smooth noise whose levels are their masks; the last image has none."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    for number in range(count):
        draw = np.random.default_rng(number).integers(0, 256, (9, 7), dtype=np.uint8)
        mask = Image.fromarray(draw).resize(SIZE_HW[::-1])
        image = Image.merge("RGB", [mask] * 3)
        if number < count - 1 and source == "alpha":
            image = Image.merge("RGBA", [Image.new("L", mask.size, 255)] * 3 + [mask])  # on black: the mask
        if number < count - 1 and source == "beside":
            mask.save(folder / f"images/{number}{('.mask.bmp', '-MaskLabel.tif')[number]}")
            mask.transpose(Image.Transpose.ROTATE_180).save(folder / f"images/{number}-condlabel.png")  # which is none
        if number < count - 1 and source == "folder":
            mask.save(folder / f"masks/{number}.png")
        image.save(folder / f"images/{number}.png")
    return load(folder / "images", folder / "index")


@pytest.fixture(params=["alpha", "beside", "folder"])
def opened(request, tmp_path, monkeypatch):
    """Return a function that opens images and the masks of their rows."""
    monkeypatch.chdir(tmp_path)
    collection = write(tmp_path, request.param)
    rows, source = np.arange(len(collection)), {"folder": str(tmp_path / "masks")}.get(request.param, request.param)
    buckets = make_buckets(collection, rows, np.array([SIZE_HW] * len(rows)), RANDOM)
    find = partial(find_masks, collection, rows, buckets.image_hw, source, training=True)
    return Images(collection, Decoder(3, 10**6, "black")), buckets, find


def test_a_mask_is_cut_and_mirrored_as_its_image(opened):
    images, buckets, find = opened
    masked = Masked(images, find(), buckets, buckets.draw_fit)
    seen, view = set(), fitted_views(buckets.draw_fit)["images"]
    for key in range(12):
        record = masked.read(key % 2, key, 0)
        expected = avg_pool2d(view(record[IMAGE], Draw(key, key % 2, key, 0))[:1].float() / 255, 8)
        torch.testing.assert_close(record["mask"].float(), expected, rtol=0, atol=1.5 / 255)
        seen.add(record["mask"].numpy().tobytes())
    assert len(seen) == 12 and masked.read(2, 0, 0)["mask"].eq(1).all() and masked.blank(0)["mask"].eq(1).all()


def test_a_concept_without_masks_has_none(opened, monkeypatch):
    images, _, find = opened
    collection = images.contents.collection
    monkeypatch.setattr(collection, "concepts", [SimpleNamespace(mask=False), SimpleNamespace(mask=None)])
    monkeypatch.setattr(collection, "concept_ids", lambda: np.array([0, 1, 1]))
    assert list(find()) == [1]


def test_a_mask_that_is_damaged_later_is_an_unreadable_image(opened):
    images, buckets, find = opened
    masks = find()
    masked = Masked(images, masks, buckets, buckets.draw_fit)
    with open(masks[1][0], "r+b") as file:
        file.truncate(150)
    with pytest.raises(UnreadableImage):
        masked.read(1, 0, 0)


@pytest.mark.parametrize(
    "source, name, size, word",
    [
        ("beside", "images/0.mask.png", (35, 45), "[45, 35]"),
        ("beside", "images/0.mask.png", None, "unreadable"),
        ("masks", "masks/0.png", (70, 91), "[90, 70]"),
        ("images", None, None, "an image of data.root"),
        ("besides", None, None, "none of 3 images"),
        ("alpha", None, None, "none of 3 images"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(tmp_path, monkeypatch, source, name, size, word):
    monkeypatch.chdir(tmp_path)
    collection = write(tmp_path, "beside")
    if name is not None:
        (tmp_path / name).write_bytes(b"no image")
    if size is not None:
        Image.new("L", size).save(tmp_path / name)
    with refuses(r"^task\.mask\.source: ") as error:
        find_masks(collection, np.arange(3), np.array([SIZE_HW] * 3), source, training=True)
    assert word in str(error.value) and (name or "").rpartition("/")[2] in str(error.value)
