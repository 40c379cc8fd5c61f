"""A text as a field of a sample: a caption in a dry run, a path."""

import torch

from data.stream.batch import Ragged
from utils.contracts import Batch


def text_field(text: str) -> dict[str, Ragged]:
    """Return the field `text` of a sample, which `texts_of` reads."""
    return {"text": Ragged(torch.tensor([*text.encode()], dtype=torch.uint8))}


def texts_of(batch: Batch) -> list[str]:
    """Return the `text` of each sample of a batch."""
    letters = bytes(batch["text"].tolist())
    ends = batch["text_offsets"].tolist()
    return [letters[start:end].decode(errors="replace") for start, end in zip(ends, ends[1:])]
