"""Safetensors files whose header has the hash of their tensors, as ModelSpec and kohya's LoRAs do.

Source: Stability-AI/ModelSpec:README.md (1.0.1), `hash_sha256`; kohya-ss/sd-scripts:library/train_util.py.
"""

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from utils.io.files import write_atomically
from utils.io.weights import write_tensors

NO_HASH = "0" * 64  # what stands in a header until the tensors behind it are hashed


def write_hashed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file; each NO_HASH in its metadata becomes the SHA-256 of all that follows the header."""

    def write(temporary: Path) -> None:
        write_tensors(temporary, tensors, metadata)
        _set_hash(temporary)

    write_atomically(path, write)


def _set_hash(path: Path) -> None:
    with open(path, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        with memoryview(content)[start:] as payload:
            digest = hashlib.sha256(payload).hexdigest()
        content[:start] = content[:start].replace(NO_HASH.encode(), digest.encode())
        content.flush()
