"""WebDataset tar files: images, and members with the same key.

The headers are followed here, because `tarfile.open` ends without a word at a damaged one and trusts every size.
"""

import os
import re
import tarfile  # noqa: TID251 (it parses single headers)
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.layouts.folders import place_image
from data.layouts.manifest import OUTSIDE
from data.layouts.names import IMAGE_SUFFIXES, is_mask_name, is_passed_over
from data.layouts.sidecars import TEXT_SUFFIXES, read_texts
from data.layouts.unused import OTHERS, Unused

_MAX_TEXT_BYTES = 2**20
_BLOCK = tarfile.BLOCKSIZE
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_ABOUT = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, *_NAMES)  # members about the next one
_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")  # of a pax header: its length in bytes, and a name


def read_tar(file: Path, name: str, unused: Unused) -> list[dict[str, Any]]:
    """Return the images of a tar file as rows.

    The texts of an image have its name up to the last dot, else up to the first one, which is WebDataset's key. An
    image such as `x.seg.png` beside `x.jpg`, without texts of its own, belongs to the latter and is no row. Without any
    text, folders are splits and classes.
    """
    images: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, str]] = {}  # their names, by stem and suffix
    contents: dict[str, bytes] = {}
    with open(file, "rb", buffering=0) as stream:
        for member in _read_members(stream.fileno(), name, unused):
            path = member.name.removeprefix("./")
            where, (stem, suffix) = f"{name}/{path}", os.path.splitext(path)
            suffix = suffix.lower()
            if suffix not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
                unused.add(OTHERS, *([where] if member.type in _PLAIN else []))
            elif member.type not in _PLAIN or re.search(OUTSIDE, path):
                unused.add("members of shards that are no plain files, or have an unsafe path", where)
            elif is_mask_name(path) or any(map(is_passed_over, path.split("/"))):
                unused.add("masks, hidden names and thumbnails in shards", where)
            elif suffix in IMAGE_SUFFIXES:
                if path in images:
                    unused.add("members of shards before another one of their name", where)
                images[path] = member
            elif member.size > _MAX_TEXT_BYTES:
                unused.add(f"texts in shards above {_MAX_TEXT_BYTES:,} bytes", where)
            else:
                texts.setdefault(stem, {})[suffix] = where
                contents[where] = os.pread(stream.fileno(), member.size, member.offset_data)
    rows, stems, read = [], {os.path.splitext(path)[0] for path in images}, set()
    for path, member in images.items():
        stem, key = os.path.splitext(path)[0], re.sub(r"\.[^/]*$", "", path)
        if stem not in texts and key != stem and key in stems:
            unused.add("further images of a sample", f"{name}/{path}")
            continue
        read.add(owner := stem if stem in texts else key)
        columns = read_texts(f"{name}/{path}", texts.get(owner, {}), contents.__getitem__, unused)._asdict()
        columns |= {"offset": member.offset_data, "length": member.size, "size": member.size}
        if not texts:
            columns["split"], columns["label"] = place_image(path)
        rows.append({"path": f"{name}/{path}", **columns})
    folders = {os.path.dirname(path) for path in images} - {""} if texts else ()
    unused.add("folders in shards with texts, which are no classes", *(f"{name}/{folder}" for folder in folders))
    alone = (file for stem in texts if stem not in read for file in texts[stem].values())
    unused.add("texts in shards without an image", *alone)
    return rows


def _read_members(descriptor: int, name: str, unused: Unused) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, up to its end or to the first damaged header."""
    end, offset, about = os.fstat(descriptor).st_size, 0, {}
    try:
        while (block := os.pread(descriptor, _BLOCK, offset)).strip(b"\0"):
            header, content = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace"), offset + _BLOCK
            size = 0 if header.type in _EMPTY else int(about.get("size", header.size))
            is_about = header.type in _ABOUT
            if not 0 <= size <= (min(end - content, _MAX_TEXT_BYTES) if is_about else end - content):
                raise ValueError(f"a member of {size:,} bytes")
            if is_about:
                about |= _read_about(header.type, os.pread(descriptor, size, content))
            else:
                header.name, header.offset_data, header.size = about.get("path", header.name), content, size
                if any(key.startswith("GNU.sparse") for key in about):
                    header.type = tarfile.GNUTYPE_SPARSE
                yield header
                about = {}
            offset = content + -(-size // _BLOCK) * _BLOCK
        fault = "" if block else "the mark of its end is missing"
        while not fault and (block := os.pread(descriptor, _MAX_TEXT_BYTES, offset)):
            fault = "its end is followed by more" if block.strip(b"\0") else ""
            offset += 0 if fault else len(block)
    except (tarfile.HeaderError, ValueError, OSError) as error:
        fault = str(error)
    if fault:
        unused.add("ends of damaged shards", f"{name} from byte {offset:,} of {end:,} ({fault})")


def _read_about(kind: bytes, content: bytes) -> dict[str, str]:
    """Return what a member says about the next one: `path`, `size` and others."""
    if kind in _NAMES:
        return {_NAMES[kind]: content.partition(b"\0")[0].decode("utf-8", "backslashreplace")}
    records, start = {}, 0
    while record := _RECORD.match(content, start):
        start += int(record[1])
        if start <= record.end():
            raise ValueError("a pax record without a value")
        records[record[2].decode()] = content[record.end() : start - 1].decode("utf-8", "backslashreplace")
    return records
