"""WebDataset tar files: images, and members with the same key."""

import re
import tarfile  # noqa: TID251 (members are listed and read in place)
from pathlib import Path
from typing import Any

from data.layouts.folders import IMAGE_SUFFIXES
from data.layouts.manifest import OUTSIDE
from data.layouts.records import Sidecar, parse_json, parse_record, parse_text
from data.layouts.unused import Unused

_TEXTS = ("txt", "cls", "json")  # the last has precedence
_MAX_TEXT_BYTES = 2**20


def read_tar(file: Path, name: str, unused: Unused) -> list[dict[str, Any]]:
    """Return the images of a tar file as rows."""
    images: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(file, "r:", errors="backslashreplace") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                key, extension = _split_name(path)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or re.search(OUTSIDE, path):
                    unused.add("members of shards that are no plain files, or have an unsafe path", f"{name}/{path}")
                elif f".{extension}" in IMAGE_SUFFIXES:
                    images[path] = member
                elif extension in _TEXTS and member.size <= _MAX_TEXT_BYTES:
                    texts.setdefault(key, {})[extension] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:  # the members before the error are valid
        unused.add("ends of damaged shards", f"{name} ({error})")
    rows = []
    for path, member in images.items():
        columns = _read_texts(f"{name}/{path}", texts.get(_split_name(path)[0], {}), unused)
        columns |= {"offset": member.offset_data, "length": member.size, "size": member.size}
        rows.append({"path": f"{name}/{path}", **columns})
    return rows


def _split_name(path: str) -> tuple[str, str]:
    """Split the path of a member into key and extension at the first dot of its name, as WebDataset does."""
    folder, slash, name = path.rpartition("/")
    key, _, extension = name.partition(".")
    return folder + slash + key, extension.lower()


def _read_texts(where: str, texts: dict[str, bytes], unused: Unused) -> dict[str, Any]:
    """Return columns from the text members of an image. where: the image, for messages."""
    sidecar, label = Sidecar(), None
    for extension in sorted(texts, key=_TEXTS.index):
        try:
            text = texts[extension].decode("utf-8-sig").strip()
            if extension == "cls":
                label = text or None
            elif extension == "txt":
                sidecar = parse_text(text)
            elif isinstance(record := parse_json(text or "{}"), dict):
                sidecar = sidecar.updated(parse_record(where, record))
                label = str(record["label"]) if isinstance(record.get("label"), str | int) else label
        except ValueError as error:  # UserError is one
            unused.add("unreadable texts of shards", f"the {extension} of {where} ({error})")
    return {**sidecar._asdict(), "label": label}
