"""Buckets: the rule, the nearest ratio, fits whose coordinates an index image gives back, images that fit nowhere."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data.images.sizes import image_sizes
from data.stream.order import Draw
from sdxl.caches.buckets import BucketFit, assign, choose_sizes, fit_into, fitted_views, make_buckets, place
from sdxl.config import BucketConfig, sdxl_sizes
from tests.data.collection.test_collection import load
from tests.support import turned

RULE = {"areas_px": [1024**2], "step_px": 64, "min_px": 512, "max_px": 2048, "sizes_hw": None, "fit": None}
POLICY = {
    "assign": "no_upscale",
    "crop": "centre",
    "small": "keep",
    "max_upscale": 1.5,
    "max_crop": 0.5,
    "flip": 0.0,
}


def config(**changes):
    return BucketConfig.model_validate(RULE | POLICY | changes)


def test_the_rule_is_that_of_sdxl():
    sizes = sdxl_sizes(1024**2, 64, 512, 2048)
    published = [[1024, 1024], [1152, 896], [896, 1152], [1216, 832], [1344, 768], [768, 1344], [1536, 640]]
    assert len(sizes) == 33 and all(size in sizes.tolist() for size in published)
    assert sizes.prod(axis=1).max() <= 1024**2 and sizes.min() == 512 and sizes.max() == 2048


def test_the_nearest_ratio_is_chosen_by_its_logarithm():
    buckets, draws = sdxl_sizes(1024**2, 64, 512, 2048), np.random.default_rng(0)
    sizes = draws.integers(1, 4000, (5000, 2))
    distance = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log(buckets[:, 0] / buckets[:, 1]))
    assert np.allclose(distance[np.arange(5000), assign(sizes, buckets)], distance.min(axis=1))
    assert assign(np.array([[1, 1], [3, 3]]), np.array([[64, 64], [32, 32], [64, 32]])).tolist() == [0, 0]


def test_the_chosen_sizes_crop_hardly_more_than_the_best_choice():
    sizes, image_hw = sdxl_sizes(1024**2, 128, 512, 2048), np.random.default_rng(0).integers(300, 2000, (60, 2))

    def lost(chosen):
        target = chosen[assign(image_hw, chosen)]
        return (1 - (target / (image_hw * (target / image_hw).max(axis=1, keepdims=True))).prod(axis=1)).mean()

    for count in (1, 2, 4, 5):
        chosen = choose_sizes(sizes, image_hw, count)
        least = min(lost(np.array(some)) for some in combinations(sizes.tolist(), count))
        assert len(chosen) == count and lost(chosen) <= 1.03 * least


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("is_random", [False, True])
def test_an_index_image_gives_back_the_recorded_coordinates(is_random, flip):
    """Its pixels hold their own row and column, so the placed image says where it was cut from."""
    draws = np.random.default_rng(int(flip))
    sizes, buckets = draws.integers(30, 300, (40, 2)), draws.integers(2, 9, (40, 2)) * 16
    fits = fit_into(sizes, buckets, (lambda slack: draws.integers(0, slack + 1)) if is_random else None)
    assert (buckets == fits.resized_hw).any(axis=1).all() and (fits.target_hw == buckets).all()
    for number, (height, width) in enumerate(sizes.tolist()):
        fit = BucketFit(*(part[number] for part in fits))
        image = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
        placed = place(image, fit, flip=flip)
        middle = tuple((fit.target_hw // 2).tolist())  # away from the edges, where a resized ramp is not straight
        row, column = ((placed[:, *middle].double().numpy() + 0.5) * fit.resized_hw / fit.original_hw - 0.5).tolist()
        column = fit.resized_hw[1] - 1 - column if flip else column  # in the mirror image
        assert placed.shape[-2:] == tuple(fit.target_hw)
        assert np.abs(np.array([row, column]) - middle - fit.crop_top_left).max() < 0.75, fit


def test_a_view_and_its_conditions_are_of_one_fit():
    image = torch.rand(3, 100, 200)
    made = assign_all([(100, 200)], crop="random", flip=0.5, sizes_hw=[[[64, 96]]], max_upscale=9.0)
    views = fitted_views(made.draw_fit)
    seen = set()
    for key in range(20):
        pixels, found = (views[name](image, Draw(key, 0, key, 0)) for name in ("images", "fit"))
        fit, is_mirrored = made.draw_fit(0, key, 0)
        assert torch.equal(pixels, place(image, fit, is_mirrored)) and found.tolist() == fit.conditions().tolist()
        assert found.tolist() == [100, 200, 0, found[3], 64, 96]
        seen.add((is_mirrored, int(found[3])))
    assert {mirrored for mirrored, _ in seen} == {False, True} and len(seen) > 10


# --- collections


def test_sizes_come_from_the_manifest_or_the_headers_read_once(tmp_path, monkeypatch):
    """The second image is turned, the third is damaged."""
    images = tmp_path / "images"
    images.mkdir()
    for number, options in enumerate([{}, {"exif": turned()}, {}]):
        Image.new("RGB", (20, 10)).save(images / f"{number}.png", **options)
    (images / "2.png").write_bytes(b"no image")
    plain = load(images, tmp_path / "plain")
    for _ in range(2):
        assert image_sizes(plain, np.arange(3), tmp_path / "sizes.json").tolist() == [[10, 20], [20, 10], [0, 0]]
        monkeypatch.setattr("data.images.sizes.read_upright_size", lambda path: None)
    columns = {"path": ["0.png", "1.png"], "width": [40, None], "height": [30, None]}
    pq.write_table(pa.table(columns), images / "manifest.parquet")
    stated = load(images, tmp_path / "stated")
    assert image_sizes(stated, np.arange(2), tmp_path / "sizes.json").tolist() == [[30, 40], [20, 10]]


def named(count):
    """Return a collection of 0.png, 1.png and so on."""
    return SimpleNamespace(table=pa.table({"path": [f"{number}.png" for number in range(count)]}))


def assign_all(image_hw, **changes):
    """Return the buckets of images of these sizes."""
    return make_buckets(named(len(image_hw)), np.arange(len(image_hw)), np.array(image_hw), config(**changes))


def test_images_that_fit_nowhere_are_counted_and_named(log):
    sizes_hw = np.array([(512, 512), (4000, 1), (600, 400), (100, 70), (1000, 1050), (40, 20), (0, 0)])[:, ::-1]

    def buckets(small):
        made = assign_all(sizes_hw, small=small, areas_px=[512**2], min_px=256, max_px=1024)
        return made, dict(zip(made.rows.tolist(), map(tuple, made.sizes_hw[made.groups].tolist())))

    kept, size_of = buckets("keep")
    assert size_of == {0: (512, 512), 2: (384, 640), 3: (448, 576), 4: (512, 512), 5: (320, 704)}
    assert sorted(np.concatenate(list(kept.dropped.values())).tolist()) == [1, 6]
    assert "1.png" in log.text and "6.png" in log.text and "buckets.max_crop" in kept.describe()
    rows = {row["path"]: list(row.values())[1:] for row in kept.list_images(named(7))}
    assert len(rows) == 7 and rows["2.png"] == [400, 600, 384, 640, 1.067, 0.1] and rows["6.png"] == ["unreadable"]
    dropped, size_of = buckets("drop")
    assert set(size_of) == {0, 2, 4} and "3 dropped: too small" in dropped.describe()
    _, size_of = buckets("native")
    assert set(size_of) == {0, 2, 3, 4} and size_of[3] == (64, 64)
    assert [kept.number_of(*pair) for pair in zip(kept.rows, kept.groups)] == [0, 1, 2, 3, 4]
    assert len(assign_all(np.zeros_like(sizes_hw)).rows) == 0


SQUARES = [[[512, 512]], [[768, 768]], [[1024, 1024]]]


@pytest.mark.parametrize(
    "how, sizes_hw, image_hw, wanted",
    [
        ("no_upscale", SQUARES, [(1999, 2000), (2000, 1999), (767, 768), (300, 310)], [1024, 1024, 512, 512]),
        ("nearest", SQUARES, [(1999, 2000), (2000, 1999), (767, 768), (890, 890)], [1024, 1024, 768, 1024]),
        ("all", SQUARES, [(700, 700)], [512, 768, 1024]),
        ("nearest", [*SQUARES[:2], [[832, 1216], [1024, 1024]]], [(500, 740), (3000, 2900)], [832, 1024]),
        ("nearest", [[[512, 512], [512, 768], [768, 512]]], [(3000, 2600), (90, 120)], [512, 512]),
        ("no_upscale", None, [(512, 512), (1200, 800), (900, 600), (2000, 3000)], [512, 896, 640, 832]),
    ],
)
def test_size_decides_between_areas_and_the_ratio_within_one(how, sizes_hw, image_hw, wanted):
    made = assign_all(image_hw, areas_px=[1024**2, 512**2, 768**2], sizes_hw=sizes_hw, assign=how)
    assert made.sizes_hw[made.groups][:, 0].tolist() == wanted
    assert [made.number_of(*pair) for pair in zip(made.rows, made.groups)] == list(range(len(wanted)))
    assert ("3 samples an epoch" in made.describe()) == (how == "all")


def test_sizes_that_the_network_cannot_take_are_refused():
    for key, value in (
        ("step_px", 48),
        ("min_px", 500),
        ("areas_px", [400**2]),
        ("areas_px", [1024**2, 50**2]),
        ("sizes_hw", [[[512, 500]]]),
    ):
        with pytest.raises(ValidationError, match=key):
            config(**{key: value})
