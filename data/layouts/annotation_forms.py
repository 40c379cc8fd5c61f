"""The forms of annotation files. Each gives marks: the name of an image, a class or None, and the kind of the mark.

None says that the file has the image without a class. An image "" is the one that has the name of the file.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element, fromstring

import yaml

from data.layouts.names import is_image_name
from data.layouts.sidecars import is_boxes, load_json
from data.layouts.unused import ORPHANS, OTHERS

CLASSES = "classes"
BOXES = "boxes"
OUTLINES = "outlines"
NAMES = "names of classes, by number"  # a form whose marks have no image
_GOOGLE = "files of Google Photos with dates and places, which nothing reads"  # a reason
Mark = tuple[str, Any, str]
Form = tuple[str, Iterable[Mark]]  # after its name; without marks, after a reason for `Unused`

_NAMES = re.compile(r".*\.(names|labels)|(classes|labels|names|synsets?|synset_words)\.txt", re.I)
_OF_STUDIO = {"choices": CLASSES, "rectanglelabels": BOXES}
_OF_XML = {"tag": CLASSES, "box": BOXES, "object": BOXES}
_OF_FIELDS = {"segmentation": OUTLINES, "mask": OUTLINES, "bbox": BOXES, "bounding_box": BOXES}


def read_form(file: Path, text: str) -> Form:
    """Return the form of a file. A broken file raises errors of many types, here or while its marks are read."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        return _read_json(load_json(text, str(file)))
    if suffix == ".xml":
        root = fromstring(text)
        form = {"annotation": "VOC", "annotations": "CVAT"}.get(root.tag)
        return (form, _read_xml(root)) if form else (OTHERS, ())
    if suffix == ".csv":
        return "CSV", _read_rows(file.stem, csv.DictReader(text.split("\n"), skipinitialspace=True))
    if suffix in (".yaml", ".yml"):
        names = yaml.safe_load(text).get("names", [])
        names = names.values() if isinstance(names, dict) else names
        return NAMES if names else OTHERS, (("", name, "") for name in names)
    lines = [line.strip() for line in text.strip().split("\n")]
    if _NAMES.fullmatch(file.name):
        return NAMES, (("", line, "") for line in lines)
    if is_boxes(text):
        return "YOLO", (("", line.split()[0], OUTLINES if len(line.split()) > 6 else BOXES) for line in lines)
    pairs = [re.split(r"[\s,;]+(?=\S+$)", line) for line in lines]
    is_list = all(len(pair) == 2 and is_image_name(pair[0]) for pair in pairs)
    return ("Caffe", ((*pair, CLASSES) for pair in pairs)) if is_list else (ORPHANS, ())


def _read_json(value: Any) -> Form:
    match value:
        case {"images": images, "annotations": marks, "categories": kinds}:
            return "COCO", _read_coco(images, marks, kinds)
        case {"classes": names, "labels": dict(labels)}:
            return "FiftyOne", _read_fiftyone(labels, names)
        case [{"data": dict(), "annotations": list()}, *_] | [{"image": str(), "choice": _}, *_]:
            return "Label Studio", _read_studio(value)
        case {"title": _, **others} if not others or others.keys() & {"photoTakenTime", "access", "people"}:
            return _GOOGLE, ()
    return ORPHANS, ()


def _find_kind(mark: Any) -> str:
    fields = mark if isinstance(mark, dict) else {}
    return next((kind for field, kind in _OF_FIELDS.items() if fields.get(field)), CLASSES)


def _read_coco(images: Any, marks: Any, kinds: Any) -> Iterator[Mark]:
    names = {kind["id"]: kind["name"] for kind in kinds}
    files = {image["id"]: image["file_name"] for image in images}
    yield from ((file, None, "") for file in files.values())
    for mark in marks:
        yield files[mark["image_id"]], names[mark["category_id"]], _find_kind(mark)


def _read_fiftyone(labels: Any, names: Any) -> Iterator[Mark]:
    for image, marks in labels.items():
        yield image, None, ""
        for mark in marks if isinstance(marks, list) else [marks]:
            word = mark["label"] if isinstance(mark, dict) else mark
            yield image, names[word] if isinstance(word, int) else word, _find_kind(mark)


def _read_studio(tasks: Any) -> Iterator[Mark]:
    for task in tasks:
        url = next(text for text in task.get("data", task).values() if is_image_name(str(text)))
        image = unquote(url)
        yield image, None, ""
        choice = task.get("choice")
        short = [{"type": "choices", "value": choice if isinstance(choice, dict) else {"choices": [choice]}}]
        for mark in itertools.chain(short, *(each["result"] for each in task.get("annotations", ()))):
            words = mark["value"].get(mark["type"])
            for word in words if isinstance(words, list) else ():
                yield image, word, _OF_STUDIO.get(mark["type"], OUTLINES)


def _read_xml(root: Element) -> Iterator[Mark]:
    """Read a file of VOC, of one image, or of CVAT."""
    for image in root.iter("image") if root.tag == "annotations" else [root]:
        name = image.get("name") or image.findtext("filename", "")
        for mark in (image, *image):
            yield name, mark.get("label") or mark.findtext("name"), _OF_XML.get(mark.tag, OUTLINES)


def _read_rows(name: str, rows: csv.DictReader) -> Iterator[Mark]:
    """Read a table of Roboflow, with a column for each class or a row for each box, or an album of iCloud."""
    kind = BOXES if name == "_annotations" else CLASSES
    for row in rows:
        image = next(iter(row.values()))
        yield image, None, ""
        if name == "_classes":
            yield from ((image, word, kind) for word, value in row.items() if value.strip() == "1")
        else:
            yield image, row.get("class", name), kind
