"""WebDataset tar files: images, and members with the same key."""

import re
import tarfile  # noqa: TID251 (members are listed and read in place)
from pathlib import Path
from typing import Any

from data.layouts.folders import IMAGE_SUFFIXES
from data.layouts.manifest import OUTSIDE
from data.layouts.records import Sidecar, parse_json, parse_record, parse_text

_TEXTS = ("txt", "cls", "json")  # the last has precedence
_MAX_TEXT_BYTES = 2**20


def read_tar(file: Path, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the images of a tar file as rows, and descriptions of skipped parts."""
    images: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, bytes]] = {}
    skipped = []
    try:
        with tarfile.open(file, "r:", errors="backslashreplace") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                key, extension = _split_name(path)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or re.search(OUTSIDE, path):
                    skipped.append(f"{path!r} in {name}, which is not a plain file, or has an unsafe path")
                elif f".{extension}" in IMAGE_SUFFIXES:
                    images[path] = member
                elif extension in _TEXTS and member.size <= _MAX_TEXT_BYTES:
                    texts.setdefault(key, {})[extension] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:  # the members before the error are valid
        skipped.append(f"the end of {name} ({error})")
    rows = []
    for path, member in images.items():
        columns, faults = _read_texts(f"{path!r} in {name}", texts.get(_split_name(path)[0], {}))
        columns |= {"offset": member.offset_data, "length": member.size, "size": member.size}
        rows.append({"path": f"{name}/{path}", **columns})
        skipped += faults
    return rows, skipped


def _split_name(path: str) -> tuple[str, str]:
    """Split the path of a member into key and extension at the first dot of its name, as WebDataset does."""
    folder, slash, name = path.rpartition("/")
    key, _, extension = name.partition(".")
    return folder + slash + key, extension.lower()


def _read_texts(where: str, texts: dict[str, bytes]) -> tuple[dict[str, Any], list[str]]:
    """Return columns from the text members of an image, and descriptions of unreadable ones."""
    sidecar, label, faults = Sidecar(), None, []
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
            faults.append(f"the {extension} of {where} ({error})")
    return {**sidecar._asdict(), "label": label}, faults
