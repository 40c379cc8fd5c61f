"""Sidecars, files with metadata beside an image: `x.txt`, `x.caption`, `x.json`, or `x.jpg.txt` etc.

Their texts and JSON records are those of boorus, captioning programs and Hydrus. A tag with a known category gets it as
a prefix, such as `character:hatsune_miku`, read by utils/formats/spelling.py.
"""

import codecs
import itertools
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import dirname, realpath, relpath
from pathlib import Path
from typing import Any

from data.layouts.names import SUFFIXES, suffix_of
from data.layouts.readers import ANNOTATIONS, Described, Sidecar
from data.layouts.scan import Folder
from data.layouts.unused import Unused
from data.layouts.values import READ, join_equal, read_caption, read_label, read_tags, refuse_value
from utils.errors import UserError, about
from utils.formats.spelling import CATEGORIES, GENERAL, PREFIXES, RATING, is_sentence, read_list, split_tags
from utils.io.files import Json, readable
from utils.io.memo import in_threads

# What prompts have around a tag, and their further networks: `((smile))`, `[hat]`, `{blue eyes}`, `<lora:name:0.8>`.
_PROMPT = re.compile(r"^(?:(?:\(\(|[\[{])[(\[{]*(\w[^()\[\]{}]*\w)[)\]}]+|<(?:lora|lyco|hypernet):.*>)$")
_BOXES = "texts of boxes, which are no tags"  # a reason
TEXT_SUFFIXES = (".cls", *SUFFIXES)  # a later one takes precedence
_MAX_BYTES = 16 * 2**20
_BOX = re.compile(r"\s*\d+(?=.*\.)(?:\s+-?[\d.][\d.e-]*){4,}\s*")  # of YOLO: the number of a class, and shares of sides
# The fields with tags of one category: texts of Danbooru, lists of gallery-dl. Other boorus have further categories.
_CATEGORY_FIELD = re.compile(r"(?:tag_string|tags)_([a-z]+)")
_FIELDS = ("id", "md5", "label", "rating", "caption", "tags", "tag_string", "unknown_tags")


def decode(content: bytes) -> str:
    """Decode a text in UTF-8, or in UTF-16 with a byte order mark. Raises UnicodeDecodeError."""
    return content.decode(find_encoding(content)).replace("\r\n", "\n").replace("\r", "\n")


def find_encoding(start: bytes) -> str:
    """Return the encoding of a text by its first bytes. UTF-16 may lack its mark."""
    if 0 in start[:2]:
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def is_field(name: str) -> bool:
    """Return whether a field of a record is read."""
    return name in _FIELDS or _CATEGORY_FIELD.fullmatch(name) is not None


def parse_text(where: str, text: str, unused: Unused, one_per_line: bool = False) -> Sidecar:
    """Split a text into tags at commas and lines; each line is also a caption, and sentences are no tags.

    where: the position of the text, for messages. one_per_line: if the text has several lines, each is one tag, commas
    included, as written by Hydrus, and only sentences are captions. The texts of a list are such lines.
    """
    caption = read_caption(text) or ""
    tags = []
    sentences = []
    one_per_line = (one_per_line and "\n" in caption) or read_list(text) is not None
    for line in caption.split("\n"):
        pieces = [line] * bool(line) if one_per_line else [_PROMPT.sub(r"\1", piece) for piece in split_tags(line)]
        if any(pieces) and is_sentence(pieces):
            sentences.append(line)
        else:
            tags += pieces
    if sentences and tags:
        unused.add("texts with sentences among tags, which are captions and no tags", where)
    caption = "\n".join(sentences) if one_per_line else caption
    return Sidecar(join_equal(tags) or None, None, caption or None)


def is_boxes(text: str) -> bool:
    """Return whether a text has the boxes or outlines of YOLO, one a line."""
    return all(map(_BOX.fullmatch, text.strip().split("\n")))


def parse_record(where: str, record: Json) -> Sidecar:
    """Read a record of a booru, of gallery-dl or of our predecessor. A field that cannot be read is a fault.

    where: the position of the record, for faults.
    """
    number = record.get("id")
    values = {}
    faults = []
    for field, read in READ.items():
        try:
            values[field] = _read_tags(record) if field == "tags" else read(record.get(field))
        except ValueError as error:
            faults.append(f"{field}: {where} has {error}")
    number = number if type(number) is int and abs(number) < 2**63 else None
    return Sidecar(**values, id=number, sidecar_fault="\n".join(faults) or None)


def _read_tags(record: Json) -> tuple[str, ...] | None:
    """Return the tags of a record, or None: from `tags`, else from `tag_string`, else from the fields of categories.

    Categories come from the names of fields, or from `tags` if it is an object.
    """
    tags = record.get("tags")
    fields = dict.fromkeys(CATEGORIES)
    fields |= {match[1]: record[match[0]] for match in filter(None, map(_CATEGORY_FIELD.fullmatch, record))}
    read = _read_words
    if isinstance(tags, dict):
        if not all(isinstance(value, str | list | None) for value in tags.values()):
            refuse_value("tags", tags)
        fields = tags
        read = read_tags
        tags = None
    else:
        tags = _read_words(record.get("tag_string")) if tags is None else read_tags(tags)
    parts = {name: read(value) for name, value in fields.items() if isinstance(value, str | list)}
    if tags is None and not parts:
        return None
    prefixed = {}
    for category, words in parts.items():
        if PREFIXES.get(category, GENERAL) not in (GENERAL, RATING):
            prefixed |= {word: f"{category}:{word}" for word in words}
    every = itertools.chain(*parts.values()) if tags is None else tags
    return join_equal(prefixed.get(word, word) for word in every)


def _read_words(value: Any) -> tuple[str, ...] | None:
    """Return the tags of a list, or of a text of a booru, with blanks between tags."""
    return read_tags(value.split() if isinstance(value, str) else value)


def read_beside(folder: Folder, files: Sequence[str]) -> Described:
    """Return what the sidecars of each image say; of several with one suffix, the first counts."""
    root = folder.root

    def read(image: str) -> Sidecar:
        texts = {suffix_of(file): str(root / file) for file in reversed(folder.sidecars[image])}
        target = dirname(realpath(root / image))
        return read_texts(str(root / image), texts, lambda path: _read_file(root, Path(path), target), folder.unused)

    found = dict(zip(folder.sidecars, in_threads(read, list(folder.sidecars))))
    boxes = [relpath(name, root) for name in folder.unused.pop(_BOXES, ())]
    folder.files.setdefault(ANNOTATIONS, []).extend(boxes)
    return found


def _read_file(root: Path, file: Path, beside: str) -> bytes:
    refuse_link_out(root, file, beside)
    if not file.is_file() or file.stat().st_size > _MAX_BYTES:
        raise UserError(f"data.root: {str(file)!r} is not a file of at most {_MAX_BYTES:,} bytes; remove it")
    return file.read_bytes()


def read_texts(image: str, texts: Mapping[str, str], read: Callable[[str], bytes], unused: Unused) -> Sidecar:
    """Read the texts of an image: their names by suffix (TEXT_SUFFIXES). `.caption` gives the caption.

    What cannot be read is a fault of the result.
    """
    sidecar = Sidecar()
    for suffix in filter(texts.get, TEXT_SUFFIXES):
        found = Sidecar()
        try:
            text = decode(read(name := texts[suffix]))
            if suffix == ".json":
                record = load_json(text, repr(name)) if text.strip() else {"tags": None}
                if isinstance(record, dict) and any(map(is_field, record)):
                    found = parse_record(repr(name), record)
                else:
                    unused.add("JSON files without tags, rating, caption, label or id", name)
            elif suffix == ".cls":
                found = Sidecar(label=read_label(text))
            elif is_boxes(text):
                unused.add(_BOXES, name)
            else:
                found = parse_text(name, text, unused, one_per_line=f"{image}.txt".lower() == name.lower())
                caption = read_caption(text) if suffix == ".caption" else found.caption
                found = found._replace(caption=sidecar.caption or caption)
        except (OSError, ValueError) as error:  # UserError is one
            unread = f"{name!r} cannot be read ({error}); write it again, as UTF-8"
            fault = str(error) if isinstance(error, UserError) else unread
            found = Sidecar(sidecar_fault=f"file: {fault.removeprefix('data.root: ')}")
        sidecar = sidecar.updated(found)
    return sidecar


def refuse_link_out(root: Path, file: Path, beside: str | None = None) -> None:
    """Raise UserError for a link out of the collection, because any text file could become a caption otherwise.

    A link may lead into the collection, or into the folder `beside`, the target of the image's link: a folder may link
    to images and their sidecars.
    """
    target = realpath(file)
    real = realpath(root)
    if file.is_symlink() and dirname(target) != beside and not target.startswith(real.rstrip("/") + "/"):
        raise UserError(
            f"data.root: {str(file)!r} is a link out of the collection, to {target!r}; replace it by the file, or "
            "remove the link"
        )


def read_lines(file: Path) -> Iterator[tuple[str, Json]]:
    """Yield the JSON object of each line, or item of one list, after its position. Raises UserError (`data.root`)."""
    with about("data.root"), readable(file, file.suffix):
        with open(file, "rb") as content:
            start = content.read(2)
        with open(file, encoding=find_encoding(start)) as lines:
            if start.startswith(b"["):
                lines = map(json.dumps, load_json(lines.read(), repr(str(file))))
            for number, line in enumerate(lines, start=1):
                where = f"{str(file)!r}, line {number},"
                if line.strip():
                    if not isinstance(record := load_json(line, where), dict):
                        raise UserError(f"data.root: {where} holds {reprlib.repr(record)}; an object is allowed")
                    yield where, record


def load_json(text: str, where: str) -> Any:
    """Parse JSON. Raises UserError (`data.root`) with its position, also for text that UTF-8 cannot encode."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.root: {where} is broken JSON ({error}); fix or remove it") from error
