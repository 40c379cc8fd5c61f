"""A cache of latents: the VAE's mean and log variance of each image in its bucket, encoded once.

    cache = LatentCache(TensorStore(folder, "cache.latents"), collection, buckets, inputs, hashes)
    cache.fill(encode, open_images(...), machine, batch_size, unreadable)
    data = data.read_from(cache, cache.fingerprints)

The key of a record is a hash of the image's bytes and of all processing steps, so only changed images are encoded
again. With random crops, each image has one fixed crop, derived from its bytes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from data.collection.collection import Collection
from data.images.record_store import TensorStore, record_key
from data.stream.loader import EvaluationStream, Example, Loader, UnreadableLog
from data.stream.order import Draw
from data.stream.source import IMAGE, Record, Source, UnreadableImage
from sdxl.caches.buckets import BucketFit, Buckets, fit_into, place
from sdxl.config import CHANNELS, STRIDE_PX
from utils import rng
from utils.contracts import LoaderMachine
from utils.io.files import Json
from utils.record.progress import track

STORED = torch.float16  # dtype of network outputs in the caches
_VERSION = 1  # version of decoding and `place`; increment it to encode everything again
_FLIP_DRAW = 4  # counter for a sample's key; the loader uses 1 and 2, buckets 3

# uint8 images [B, 3, H, W] on the device -> mean and log variance [B, 4, h, w]; in the order of SDXL's VAE, unscaled.
EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]


class LatentCache(Source):
    """A source of latents for the samples of `buckets`, and for their mirror images if their `flip` is above 0.

    inputs: what the latents depend on beside the images, such as a hash of the VAE. hashes: from `image_hashes`.
    fits: [samples, variants, 2]; variant 1 is the mirror image. keys: record keys [samples, variants], 32 hexadecimal
    digits.
    """

    def __init__(
        self,
        store: TensorStore,
        collection: Collection,
        buckets: Buckets,
        inputs: Sequence[Any],
        hashes: list[str],
    ) -> None:
        self.store = store
        self.collection = collection
        self.buckets = buckets
        self._flip = buckets.config.flip
        self.variants = 2 if self._flip > 0 else 1
        digests = bytes.fromhex("".join(f"{digest[:32]:0>32}" for digest in hashes))
        words = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 1, 2)
        variant = np.arange(self.variants, dtype=np.uint64)[:, None]

        def draw_corner(slack: ndarray) -> ndarray:
            return (rng.mix64(words + variant) % (slack + 1).astype(np.uint64)).astype(np.int64)

        shape = len(hashes), self.variants, 2
        bucket_hw = np.broadcast_to(buckets.sizes_hw[buckets.groups][:, None], shape)
        choose_corner = draw_corner if buckets.config.crop == "random" else None
        self.fits = fit_into(buckets.image_hw[:, None], bucket_hw, choose_corner)
        done = np.concatenate([self.fits.resized_hw, self.fits.conditions()], axis=-1).astype(np.uint64)
        made_by = np.uint64(int(record_key(_VERSION, inputs)[:16], 16))
        for number in (made_by, variant, *np.split(done, done.shape[-1], axis=-1)):
            words = rng.mix64(words + number)
        self.keys = np.frombuffer(words.astype(">u8").tobytes().hex().encode(), "S32").reshape(shape[:2])

    @property
    def fingerprints(self) -> dict[str, str]:
        """A hash of all keys, by configuration key."""
        return {self.store.config_key: record_key(np.sort(self.keys, axis=None).tobytes().decode())}

    def fit(self, number: int, variant: int) -> BucketFit:
        """Return the fit of a sample, by its index in `buckets`."""
        return BucketFit(*(part[number, variant] for part in self.fits))

    @torch.no_grad()
    def fill(
        self, encode: EncodeImages, images: Source, machine: LoaderMachine, batch_size: int, unreadable: UnreadableLog
    ) -> None:
        """Encode missing records, split over the ranks; unreadable images are reported and skipped.

        Raises UserError as `TensorStore.put` does.
        """
        is_missing = self.store.is_missing(self.keys)
        buckets = self.buckets
        chosen = is_missing.any(axis=1)
        variants = np.flatnonzero(is_missing.any(axis=0)).tolist()
        if not variants:
            return

        def view(variant: int, image: Tensor, draw: Draw) -> Tensor:
            return place(image, self.fit(buckets.number_of(draw.index, draw.group), variant), flip=variant == 1)

        def size(example: Example) -> Json:
            number = buckets.number_of(example.draw.index, example.draw.group)
            return {"size_hw": torch.tensor(example.record[IMAGE].shape[-2:]), "number": number}

        views = {str(variant): functools.partial(view, variant) for variant in variants}
        loader = Loader(self.collection, images, views, size, machine, unreadable.add, training=False)
        stream = EvaluationStream(loader, buckets.rows[chosen], batch_size, buckets.groups[chosen])
        for batch in track(stream, len(stream), "encoding images"):
            latents = [[part.to(STORED) for part in encode(batch[name])] for name in views]
            samples = zip(*(batch[name].tolist() for name in ("number", "weight", "size_hw")))
            for index, (number, weight, size_hw) in enumerate(samples):
                path = self.collection.row(buckets.rows[number]).path
                if weight > 0 and size_hw != (expected := buckets.image_hw[number].tolist()):
                    unreadable.add([(path, f"size is {size_hw}, not {expected}; write the manifest again")])
                elif weight > 0:
                    for variant, (mean, logvar) in zip(variants, latents):
                        record = {"latent_mean": mean[index], "latent_logvar": logvar[index]}
                        self.store.put(self.keys[number, variant].decode(), path, record)
        self.store.finish()

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return `latent_mean`, `latent_logvar` [4, h, w] and `fit` [6] (`BucketFit.conditions`) of a row in a bucket.

        key: the key of the draw, which decides between the image and its mirror image.
        Raises UnreadableImage if a record is missing.
        """
        return self.read_variant(row, group, self._variant_of(key))

    def find_fit(self, row: int, key: int, group: int) -> tuple[BucketFit, bool]:
        """Return the fit of a record, and whether it is of the mirror image; as for `read`."""
        variant = self._variant_of(key)
        return self.fit(self.buckets.number_of(row, group), variant), variant == 1

    def _variant_of(self, key: int) -> int:
        return int(self.variants > 1 and rng.hash_counters(key, _FLIP_DRAW) < self._flip * 2**63)

    def read_variant(self, row: int, group: int, variant: int) -> Record:
        """Return the record of the image (variant 0) or of its mirror image (1)."""
        number = self.buckets.number_of(row, group)
        record = self.store.read(self.keys[number, variant].decode())
        if record is None:
            advice = "run the same command again to encode missing images"
            raise UnreadableImage(self.collection.row(row).path, "missing or damaged in the cache of latents", advice)
        return record | {"fit": torch.from_numpy(self.fit(number, variant).conditions())}

    def blank(self, group: int) -> Record:
        """Return zero latents in the shape of a bucket."""
        size = torch.from_numpy(self.buckets.sizes_hw[group])
        latents = torch.zeros(CHANNELS, *(size // STRIDE_PX).tolist(), dtype=STORED)
        fit = torch.cat([size, torch.zeros_like(size), size])
        return {"latent_mean": latents, "latent_logvar": latents, "fit": fit}
