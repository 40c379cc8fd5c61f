"""A cache of encoded captions: the outputs of both text encoders, computed once.

    cache = TextCache(TensorStore(folder, "cache.texts"), {"encoders": digest, "most_chunks": 1}, length=77)
    cache.fill(captions, encode, batch_size)
    cache.read(caption)

If captions vary (shuffled or dropped tags), `vary_caption` creates K variants of each in advance.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.images.record_store import TensorStore, record_key
from data.stream.source import Record
from sdxl.caches.latent_cache import STORED
from utils import rng
from utils.errors import UserError
from utils.io.files import Values, sha256_text
from utils.ranks import distributed
from utils.record.progress import track

# Captions -> prompt_embeds [B, 77 * chunks, 2048] and pooled_prompt_embeds [B, 1280].
EncodeTexts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


def vary_caption(caption: str, number: int, vary: Callable[[str, torch.Generator], str]) -> str:
    """Return variant `number` of a caption; the generator of `vary` depends only on the caption and the number."""
    seed = int(sha256_text(caption)[:15], 16)
    return vary(caption, torch.Generator().manual_seed(rng.hash_counters(seed, number)))


@dataclass(frozen=True)
class TextCache:
    """Encoded captions. inputs: what they depend on beside the text, such as hashes of the encoders.

    Rows of `prompt_embeds` that are zero are padding, up to `length` rows, and are not stored.
    """

    store: TensorStore
    inputs: Values
    length: int

    def _key(self, caption: str) -> str:
        return record_key(self.inputs, caption)

    @torch.no_grad()
    def fill(self, captions: Iterable[str], encode: EncodeTexts, batch_size: int) -> None:
        """Encode missing captions, split over the ranks; all ranks must pass the same captions."""
        texts = {self._key(text): text for text in captions}
        missing = list(itertools.compress(texts.values(), self.store.is_missing(np.array(list(texts)))))
        mine = missing[distributed.rank() :: distributed.world_size()]
        starts = range(0, len(mine), batch_size)
        for start in track(starts, len(starts), "encoding captions"):
            part = mine[start : start + batch_size]
            for text, embeds, pooled in zip(part, *(output.to(STORED) for output in encode(part))):
                tensors = {"prompt_embeds": embeds[embeds.any(dim=-1)], "pooled_prompt_embeds": pooled}
                self.store.put(self._key(text), repr(text), tensors)
        self.store.finish()

    def read(self, caption: str) -> Record:
        """Return `prompt_embeds` [length, 2048] and `pooled_prompt_embeds` [1280] of a caption, float32.

        Raises UserError if the record is missing or damaged.
        """
        record = self.store.read(self._key(caption))
        if record is None:
            raise UserError(
                f"{self.store.config_key}: the caption {caption!r} is missing or damaged in the cache; run the same "
                "command again to encode missing captions"
            )
        record = {name: tensor.float() for name, tensor in record.items()}  # autocast on a CPU cannot stack float16
        embeds = record["prompt_embeds"]
        return {**record, "prompt_embeds": functional.pad(embeds, (0, 0, 0, self.length - len(embeds)))}
