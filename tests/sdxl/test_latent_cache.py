"""Caches of latents and texts: what changed is encoded again and nothing else; what training reads of them."""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.bytes import Images
from data.images.decode import Decoder
from data.images.record_store import TensorStore
from data.images.sizes import image_hashes, image_sizes
from data.open import Data
from data.stream.loader import UnreadableLog
from data.stream.order import GroupedSampler
from sdxl.caches.buckets import make_buckets, place
from sdxl.caches.latent_cache import LatentCache
from sdxl.caches.text_cache import TextCache, vary_caption
from sdxl.config import BucketConfig
from tests.data.collection.test_collection import load
from tests.support import refuses

CONFIG = BucketConfig(
    areas_px=[96**2], step_px=32, min_px=64, max_px=128, sizes_hw=None, fit=None, assign="no_upscale",
    crop="centre", small="keep", max_upscale=8.0, max_crop=0.9, flip=0.0,
)  # fmt: skip
RECIPE = ("0" * 64, "white", False)
MACHINE = SimpleNamespace(device=torch.device("cpu"), channels_last=False, workers=0, prefetch_batches=2)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(14):
        pixels = np.random.default_rng(number).integers(0, 256, (80 + 5 * (number % 3) ** 3, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02}.png")
    return tmp_path


class Encoder:
    """Average each 8 x 8 pixels; counts the images."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        mean = torch.nn.functional.avg_pool2d(images.float() / 255, 8)
        mean = torch.cat([mean, mean.mean(dim=1, keepdim=True)], dim=1)
        return mean, -mean


def open_cache(folder, config=CONFIG, recipe=RECIPE):
    collection = load(folder / "images", folder / "index")
    rows = np.arange(len(collection))
    buckets = make_buckets(collection, rows, image_sizes(collection, rows, folder / "sizes.json"), config)
    hashes = image_hashes(collection, buckets.rows, folder / "hashes.json")
    return LatentCache(TensorStore(folder / "store", "cache.latents"), collection, buckets, recipe, hashes)


def missing(cache):
    return np.count_nonzero(cache.store.is_missing(cache.keys))


def fill(folder, config=CONFIG, recipe=RECIPE):
    """Return the filled cache and how many images were encoded."""
    cache, encode, unreadable = open_cache(folder, config, recipe), Encoder(), UnreadableLog(None)
    files = Images(cache.collection, Decoder(3, 10**6))
    expected = missing(cache)
    cache.fill(encode, files, MACHINE, 3, unreadable)
    assert missing(cache) == len(unreadable.seen) and (encode.seen >= expected or unreadable.seen)
    return cache, expected


def assert_right(cache):
    """Every record is what encoding its image gives."""
    files = Images(cache.collection, Decoder(3, 10**6))
    for number, (row, group) in enumerate(zip(cache.buckets.rows.tolist(), cache.buckets.groups.tolist())):
        for variant in range(cache.variants):
            record, fit = cache.read_variant(row, group, variant), cache.fit(number, variant)
            image = files.read(row)["image"]
            mean = Encoder()(place(image, fit, flip=variant == 1)[None])[0][0]
            assert torch.equal(record["latent_mean"], mean.half())
            assert torch.equal(record["latent_logvar"], -mean.half())
            sides = [8 * side for side in mean.shape[-2:]]
            assert record["fit"].tolist() == [*image.shape[-2:], *fit.crop_top_left, *sides]


def test_what_changed_is_encoded_again_and_nothing_else(images):
    cache, encoded = fill(images)
    assert encoded == 14 and fill(images)[1] == 0 and len(cache.buckets.sizes_hw) > 1
    assert_right(cache)
    first = cache.fingerprints
    time.sleep(0.01)
    Image.new("RGB", (80, 80), "red").save(images / "images/03.png")
    os.rename(images / "images/04.png", images / "images/renamed.png")
    changed, encoded = fill(images)
    assert encoded == 1
    assert changed.fingerprints != first
    assert_right(changed)
    for config, recipe in (
        (CONFIG, ("1" * 64, "white", False)),
        (CONFIG, ("0" * 64, "black", False)),
        (CONFIG.model_copy(update={"flip": 0.5}), RECIPE),  # the mirror images
        (CONFIG.model_copy(update={"areas_px": [128**2]}), RECIPE),
    ):
        other, encoded = fill(images, config, recipe)
        assert encoded == 14 and fill(images, config, recipe)[1] == 0
        assert_right(other)
    other, encoded = fill(images, CONFIG.model_copy(update={"crop": "random"}))
    assert 4 < encoded < 14  # one that is not cropped is the same
    assert_right(other)
    assert fill(images)[1] == 0


def tensors(example):
    return example.record


def test_training_and_evaluation_read_the_cache(images):
    cache, _ = fill(images, CONFIG.model_copy(update={"flip": 0.5}))
    data = Data(cache.collection, cache, MACHINE, seed=0, batch_size=4, run_path=None)
    rows, groups = cache.buckets.rows, cache.buckets.groups
    loader = data.train(rows, tensors, {}, sampler=GroupedSampler(rows, groups, 4, 0))
    steps, mirrored, evaluated = loader.steps(0, 4, 4), [], []
    for _ in range(12):
        (batch,) = next(steps)
        for row, key, latents in zip(batch["sample_id"].tolist(), batch["key"].tolist(), batch["latent_mean"]):
            mirrored.append(int(cache.find_fit(row, key, groups[row])[1]))
            assert torch.equal(cache.read_variant(row, groups[row], mirrored[-1])["latent_mean"], latents)
        assert batch["latent_mean"].dtype == torch.float16 and bool((batch["weight"] == 1).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in an evaluation
        for batch in data.evaluation(rows, tensors, {}, groups=groups):
            evaluated += batch["sample_id"][batch["weight"] > 0].tolist()
    assert 12 < sum(mirrored) < 36 and sorted(evaluated) == rows.tolist()


def test_an_unreadable_image_has_blank_latents_of_its_buckets_shape(images):
    cache = open_cache(images)
    path = cache.collection.absolute_path(5)
    path.write_bytes(path.read_bytes()[:300])  # its header is whole
    cache, _ = fill(images)
    assert missing(cache) == 1
    data = Data(cache.collection, cache, MACHINE, seed=0, batch_size=4, run_path=None)
    weights = dict.fromkeys(range(14), 0)
    for batch in data.evaluation(cache.buckets.rows, tensors, {}, groups=cache.buckets.groups):
        for row, weight in zip(batch["sample_id"].tolist(), batch["weight"].tolist()):
            weights[row] += weight
    assert weights == {row: float(row != 5) for row in range(14)}


def test_a_size_that_the_manifest_states_wrongly_is_found(images, log):
    cache = open_cache(images)
    Image.new("RGB", (33, 44)).save(cache.collection.absolute_path(2))  # as of a manifest made before
    cache.fill(Encoder(), Images(cache.collection, Decoder(3, 10**6)), MACHINE, 3, UnreadableLog(None))
    assert missing(cache) == 1 and "02.png" in log.text


# --- texts


def test_captions_are_encoded_once_each(tmp_path):
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        lengths = torch.tensor([len(text) for text in texts]).float()
        embeds = lengths[:, None, None].repeat(1, 154, 8)
        embeds[:, 77:] *= (lengths == 5)[:, None, None]  # "a cat" has two chunks
        return embeds, lengths[:, None].expand(-1, 6)

    def open_texts(encoders="a"):
        return TextCache(TensorStore(tmp_path, "cache.texts"), {"encoders": encoders, "most_chunks": 2}, 154)

    for _ in range(2):
        cache = open_texts()
        cache.fill(["a cat", "", "été", "a cat"], encode, 2)
    assert encoded == ["a cat", "", "été"]
    record = cache.read("été")
    assert record["prompt_embeds"].sum(dim=1).tolist() == [24] * 77 + [0] * 77
    assert cache.read("a cat")["prompt_embeds"].eq(5).all() and record["pooled_prompt_embeds"].tolist() == [3] * 6
    assert record["prompt_embeds"].dtype == torch.float32
    with refuses(r"^cache\.texts: the caption 'a dog'"):
        cache.read("a dog")
    open_texts("b").fill(["a cat"], encode, 2)
    assert len(encoded) == 4


def test_variants_of_a_caption_are_the_same_every_time():
    def vary(caption, generator):
        return " ".join(caption.split()[place] for place in torch.randperm(4, generator=generator).tolist())

    variants = [vary_caption("a b c d", number, vary) for number in range(8)]
    assert variants == [vary_caption("a b c d", number, vary) for number in range(8)] and len(set(variants)) > 4
