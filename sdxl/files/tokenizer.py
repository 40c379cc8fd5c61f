"""CLIP's tokenizer without a hub. Its vocabulary comes from the package open_clip_torch.

ids, weights = tokenize(["a (cat:1.2)"], chunks=3, emphasis=True)    # int64 [1, 3, 77] for the first encoder
ids, _ = tokenize(["a cat, outdoors"], chunks=3)    # text as it is
pad_second(ids)                                  # for the second

Differs: the ids equal open_clip's, except that its control words `<start_of_text>` and `<end_of_text>` are plain text
here, and except for U+0345 and unassigned characters. The folder `tokenizer_2` of the published SDXL makes "!" a
control word, so "!!" has other ids there.
"""

import gzip
import html
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.formats.emphasis import read_emphasis

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

BOS = 49406
EOT = 49407
LENGTH = 77  # ids in a chunk, with BOS and EOT
_ROOM = LENGTH - 2
_LONG = 8  # tokens of a word that may be cut at the end of a chunk
_MERGES = 48_894
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CONTROL = re.compile(r"<\|(startoftext|endoftext)\|>")


def build_tokenizer() -> "CLIPTokenizer":
    """Return the tokenizer as an object of transformers, for diffusers' pipelines and folders.

    Raises ModuleNotFoundError if open_clip_torch is not installed.
    Source: mlfoundations/open_clip:src/open_clip/tokenizer.py, SimpleTokenizer.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    package = find_spec("open_clip")  # whose import is slow
    if package is None:
        raise ModuleNotFoundError("open_clip has CLIP's vocabulary", name="open_clip")
    text = gzip.decompress(Path(package.submodule_search_locations[0], _FILE).read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : _MERGES + 1]]
    symbols = bytes_to_unicode().values()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    vocab = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def tokenize(captions: Sequence[str], chunks: int, *, emphasis: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the ids of captions, int64 [B, chunks, 77], and the weights of their tokens, float32, for `encode_text`.

    Each chunk has BOS, up to 75 tokens, then EOT to the end. Tokens beyond the last chunk are dropped.
    emphasis: read brackets and BREAK (utils/formats/emphasis.py); otherwise they are text, and the weights are None.
    """
    ids = torch.full((len(captions), chunks, LENGTH), EOT)
    ids[..., 0] = BOS
    weights = torch.ones(ids.shape)
    for number, caption in enumerate(captions):
        for chunk, tokens in enumerate(_fill_chunks(caption, emphasis)[:chunks]):
            if tokens:
                place = number, chunk, slice(1, len(tokens) + 1)
                ids[place], weights[place] = map(torch.tensor, zip(*tokens))
    return ids, weights if emphasis else None


def count_chunks(caption: str, *, emphasis: bool = False) -> int:
    """Return how many chunks hold a caption, at least 1."""
    return len(_fill_chunks(caption, emphasis))


def _fill_chunks(caption: str, emphasis: bool) -> list[list[tuple[int, float]]]:
    """Return the tokens and weights of each chunk of a caption, without BOS and EOT; only the first may be empty.

    A word that does not fit begins the next chunk; a long one is cut. Source: comfyanonymous/ComfyUI:comfy/sd1_clip.py.
    """
    chunks = []
    for parts in read_emphasis(caption).chunks if emphasis else [[(caption, 1.0)]]:
        chunks.append([])
        for text, weight in parts:
            for word in _clean(text).split():
                tokens = [(token, weight) for token in _tokens_of(word)]
                while len(chunks[-1]) + len(tokens) > _ROOM:
                    room = _ROOM - len(chunks[-1]) if len(tokens) >= _LONG else 0
                    chunks[-1] += tokens[:room]
                    tokens = tokens[room:]
                    chunks.append([])
                chunks[-1] += tokens
    return [chunk for chunk in chunks if chunk] or [[]]


@lru_cache(2**20)
def _tokens_of(word: str) -> tuple[int, ...]:
    """Return the tokens of a word between spaces, which do not depend on the words beside it."""
    return tuple(_encoder().encode(word, add_special_tokens=False).ids)


def pad_second(ids: Tensor) -> Tensor:
    """Return ids [..., 77] with the padding of the second encoder's training: 0 after the first EOT."""
    is_end = ids == EOT
    return ids.masked_fill(is_end.cumsum(-1) > is_end.long(), 0)


@cache
def _encoder() -> "Tokenizer":
    """Return a separate tokenizer, because a pipeline that pads or truncates changes its tokenizer's settings."""
    return build_tokenizer().backend_tokenizer


def _clean(text: str) -> str:
    """Clean a text as in CLIP's training; transformers' control words become plain text.

    Source: mlfoundations/open_clip:src/open_clip/tokenizer.py, _clean_lower.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _CONTROL.sub(r"<| \1 |>", " ".join(text.split()).lower())
