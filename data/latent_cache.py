"""Latents of images, encoded once: the mean and log variance that the VAE gives of each image in its bucket.

    cache = LatentCache(TensorStore(folder, "cache.latents"), collection, buckets, config.buckets, recipe, hashes)
    cache.fill(encode, open_images(...), machine, batch_size, unreadable)
    data = data.read_from(LatentSource(cache), ...)      # no views; the fields call cache.choose

A record's key is a hash of the image's bytes and of everything that was done to them, so that what changed is encoded
again, and nothing else. With random crops, each image keeps one, drawn from its own bytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.buckets import BucketConfig, Buckets, Fit, fit_into, measure_rows, place
from data.collection import Collection
from data.image_formats import UnreadableImage
from data.loader import EvaluationStream, Example, Loader, SampleReader, UnreadableLog, no_fields
from data.source import IMAGE, Record, Source
from data.stream import Draw, Policy
from data.table import is_packed
from data.tensor_store import STORED, MissingRecord, TensorStore, record_key
from utils import rng
from utils.contracts import Machine
from utils.io.files import sha256_file, sha256_text
from utils.ranks import distributed
from utils.record.progress import track

_VERSION = 1  # of what `place` and the decoder make of a file: another number encodes everything again
_CHANNELS, _SHRINK = 4, 8  # of SDXL's latents
PARTS = ("latent_mean", "latent_logvar", "fit")  # of what `choose` returns

# uint8 images [B, 3, H, W] on the device -> mean and log variance [B, 4, h, w]; in the order of SDXL's VAE, unscaled.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]


class LatentRecipe(NamedTuple):
    """What latents depend on beside the image and its fit. vae: a hash of the weights."""

    vae: str
    background: Any
    icc: bool = False


def image_hashes(collection: Collection, rows: np.ndarray, cache: Path) -> list[str]:
    """Return the SHA-256 of the rows' files, "" for one that cannot be opened; rank 0 reads, changed files only.

    Of shards it is what the manifest states.
    """
    if is_packed(collection.table.schema) and collection.table["sha256"].null_count == 0:
        return collection.table["sha256"].take(rows).to_pylist()
    found = distributed.rank_zero_call(lambda: measure_rows(collection, rows, cache, _hash, "images, to know changes"))
    return [digest or "" for digest in found]


def _hash(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:  # of a disk, perhaps for now; the decoder names the file
        return None


class LatentCache:
    """The latents of all rows of `buckets`: of each image, and of its mirror image where the config asks for some.

    hashes: of the images, as `image_hashes` returns them. keys: of the records, [rows, variants]. conditions: of their
    fits, int64 [rows, variants, 6].
    """

    def __init__(
        self,
        store: TensorStore,
        collection: Collection,
        buckets: Buckets,
        config: BucketConfig,
        recipe: LatentRecipe,
        hashes: list[str],
    ) -> None:
        self.store, self.collection, self.buckets, self.recipe = store, collection, buckets, recipe
        self._crop, self._flip = config.crop, config.flip
        self.variants = 2 if config.flip > 0 else 1
        self._seeds = [int(digest[:15] or "0", 16) for digest in hashes]
        fits = [self.fit(number, variant) for number in range(len(hashes)) for variant in range(self.variants)]
        made_by = record_key(_VERSION, recipe)
        digests = (digest for digest in hashes for _ in range(self.variants))
        keys = [sha256_text(f"{made_by} {digest} {fit}")[:32] for digest, fit in zip(digests, fits)]
        self.keys = np.array(keys, dtype="S32").reshape(-1, self.variants)
        conditions = torch.tensor([fit.conditions() for fit in fits], dtype=torch.int64)
        self.conditions = conditions.reshape(-1, self.variants, 6)

    def fit(self, number: int, variant: int) -> Fit:
        """Return how the image of `buckets.rows[number]` fills its bucket; variant 1 is the mirror image."""
        generator = None
        if self._crop == "random":
            generator = rng.generator_for(rng.hash_counters(self._seeds[number], variant))
        bucket_hw = self.buckets.sizes_hw[self.buckets.groups[number]]
        return fit_into(self.buckets.image_hw[number], bucket_hw, self._crop, generator, flip=variant == 1)

    def missing(self) -> int:
        """Return how many records are not in the store."""
        return int(np.count_nonzero(~self.store.has(self.keys)))

    @torch.no_grad()
    def fill(
        self, encode: EncodeImages, images: Source, machine: Machine, batch_size: int, unreadable: UnreadableLog
    ) -> None:
        """Encode what is missing, each rank its share; an image that cannot be read is reported and skipped.

        Raises UserError as `TensorStore.put` does.
        """
        for variant in range(self.variants):
            absent = distributed.broadcast_object(np.flatnonzero(~self.store.has(self.keys[:, variant])))
            if len(absent) == 0:
                continue
            reader = SampleReader(
                self.collection, _FittedFiles(images, self, variant), {"images": _as_read}, no_fields, training=False
            )
            policy = Policy(0, batch_size, batch_size, distributed.rank(), distributed.world_size())
            rows, groups = self.buckets.rows[absent], self.buckets.groups[absent]
            loader = EvaluationStream(Loader(reader, machine, unreadable.add), rows, policy, groups)
            for batch in track(loader, len(loader), "encoding images"):
                mean, logvar = (part.to(STORED) for part in encode(batch["images"]))
                for at, (row, weight) in enumerate(zip(batch["sample_id"].tolist(), batch["weight"].tolist())):
                    if weight > 0:
                        key = self.keys[self.buckets.place_of(row), variant].decode()
                        record = {"latent_mean": mean[at], "latent_logvar": logvar[at]}
                        self.store.put(key, self.collection.view(row).path, record)
        self.store.finish()

    def choose(self, example: Example) -> Record:
        """Return one variant of a record of `LatentSource`: in training the mirror image as often as configured."""
        mirrored = example.training and bool(torch.rand((), generator=example.generator) < self._flip)
        return {name: example.record[f"{name}_{int(mirrored)}"] for name in PARTS}


def _as_read(image: Tensor, draw: Draw) -> Tensor:
    return image


class _FittedFiles:
    """The image files of a cache, each in its bucket: uint8 [3, H, W]."""

    def __init__(self, images: Source, cache: LatentCache, variant: int) -> None:
        self.inner, self._cache, self._variant = images, cache, variant

    def read(self, row: int) -> Record:
        number = self._cache.buckets.place_of(row)
        fit, image = self._cache.fit(number, self._variant), self.inner.read(row)[IMAGE]
        if tuple(image.shape[-2:]) != fit.original_hw:
            found, stated = (f"{size[1]} x {size[0]}" for size in (image.shape[-2:], fit.original_hw))
            name = self._cache.collection.view(row).path
            advice = f"{found}, not {stated}; make the manifest again"
            raise UnreadableImage(name, "its size is not the stated one", advice)
        return {IMAGE: place(image, fit)}

    def blank(self, group: int) -> Record:
        return {IMAGE: torch.zeros(3, *self._cache.buckets.sizes_hw[group], dtype=torch.uint8)}


class LatentSource:
    """The records of a cache: of each variant v `latent_mean_v`, `latent_logvar_v` [4, h, w], as they are stored, and
    `fit_v` int64 [6], of `Fit.conditions`. fingerprints: of the cache, by its configuration key.
    """

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache
        self.fingerprints = {cache.store.key: record_key(sorted(key.decode() for key in cache.keys.reshape(-1)))}

    def read(self, row: int) -> Record:
        """Return a row's record. Raises UnreadableImage where the cache does not have it, or has it damaged."""
        number, name = self.cache.buckets.place_of(row), self.cache.collection.view(row).path
        if number is None:
            raise UnreadableImage(name, "no latents", "it has no bucket")
        found = {}
        for variant, (key, fit) in enumerate(zip(self.cache.keys[number].tolist(), self.cache.conditions[number])):
            try:
                record = self.cache.store.read(key.decode())
            except MissingRecord as error:
                raise UnreadableImage(name, "no latents", str(error)) from None
            found |= {f"{name}_{variant}": tensor for name, tensor in record.items()} | {f"fit_{variant}": fit}
        return found

    def blank(self, group: int) -> Record:
        """Return latents of zeros in a bucket's shape."""
        size = torch.from_numpy(self.cache.buckets.sizes_hw[group])
        latents = torch.zeros(_CHANNELS, *(size // _SHRINK).tolist(), dtype=STORED)
        fit = torch.cat([size, torch.zeros_like(size), size])
        made = dict(zip(PARTS, (latents, latents, fit)))
        return {f"{name}_{variant}": part for variant in range(self.cache.variants) for name, part in made.items()}
