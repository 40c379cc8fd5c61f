"""The header of a safetensors file, read and checked before any tensor of the file.

    bytes 0-7       length N of the header, little-endian
    bytes 8-7+N     JSON: {"<name>": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}
    the rest        the tensors' bytes, to which the offsets point

Everything that the header claims must be in the file, so that later allocations never exceed the file's size.
Source: https://github.com/safetensors/safetensors, README, "Format".
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError

# Names and metadata of the largest published networks take 2 MiB; the format itself allows 100 MB.
MAX_HEADER_BYTES = 16 * 2**20
_MAX_AXES = 64  # of a tensor of torch's
_SHOWN_CHARACTERS = 80
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


class Header(NamedTuple):
    """The checked content of a header: tensors by name, on the meta device, and the metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class _HeaderError(ValueError):
    """The first error in a header."""


def read_header(path: Path, key: str) -> Header:
    """Read and check the header of a safetensors file; no tensor is read or allocated.

    Raises UserError that begins with `key`, the configuration key that named the file, and names the first error: a
    length that the file does not have, invalid JSON or a name that occurs twice, an unknown dtype, a shape that is
    negative or does not fill its bytes, bytes outside of the file, shared by two tensors or used by none, metadata that
    are not strings.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if size < 8:
                raise _HeaderError(f"it has {size} bytes, too few for a header's length")
            if length > size - 8:
                raise _HeaderError(f"it says that its header has {length:,} bytes, the file has {size:,}")
            if length > MAX_HEADER_BYTES:
                raise _HeaderError(f"its header has {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed")
            return _check_header(_parse(stream.read(length)), size - 8 - length)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from None
    except _HeaderError as error:
        raise UserError(
            f"{key}: {path} is not a readable safetensors file ({error}); download it again or name another"
        ) from None


def _parse(content: bytes) -> dict[str, Any]:
    """Parse a header's JSON, in which every name stands once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise _HeaderError(f"its header names {_show(twice)} twice")
        return found

    def no_number(text: str) -> float:
        raise _HeaderError(f"its header holds {text}, which is not JSON")

    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except _HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise _HeaderError(f"its header is not JSON: {_show(str(error))}") from None
    if not isinstance(header, dict):
        raise _HeaderError(f"its header is a JSON {type(header).__name__}, no object")
    return header


def _check_header(header: dict[str, Any], data_bytes: int) -> Header:
    """Check every entry of a header, and that together they take the file's data once and whole."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderError("its __metadata__ is not a flat object of strings")
    spans, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, span = _check_entry(name, entry)
        spans.append((*span, name))
        tensors[name] = (shape, dtype)
    end = 0
    for first, last, name in sorted(spans):
        if last > data_bytes:
            raise _HeaderError(f"{_show(name)} claims to end at byte {last:,} of {data_bytes:,}")
        if first != end:
            raise _HeaderError(
                f"{_show(name)} begins at byte {first:,}, "
                + ("within the tensor before it" if first < end else f"after a gap from byte {end:,}")
            )
        end = last
    if end != data_bytes:
        raise _HeaderError(f"its tensors take {end:,} bytes, the file holds {data_bytes:,}")
    made = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    return Header(made, metadata)


def _check_entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    """Check the entry of one tensor; returns its dtype, shape, first byte and the byte after its last."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{_show(name)} is not an object of dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _HeaderError(f"{_show(name)} has dtype {_show(entry['dtype'])}; known are {' '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_AXES:
        raise _HeaderError(
            f"{_show(name)} has shape {_show(shape)}; up to {_MAX_AXES} whole numbers from 0 up are allowed"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _HeaderError(f"{_show(name)} has data_offsets {_show(offsets)}; two ascending whole numbers are allowed")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != offsets[1] - offsets[0]:
        raise _HeaderError(
            f"{_show(name)} of shape {_show(shape)} and dtype {entry['dtype']} takes {min(wanted, 2**63):,} bytes"
            f"{' and more' if wanted > 2**63 else ''}, but is given {offsets[1] - offsets[0]:,}"
        )
    return dtype, shape, (offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    """Tell whether a value is a list of whole numbers that 63 bits hold (true is none)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _show(value: Any) -> str:
    """Return a value as a message may hold it: quoted, without control characters, and short."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
