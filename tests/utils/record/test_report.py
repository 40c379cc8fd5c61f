"""An evaluation's page: complete in one file, escaped, and short however long its tables are."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from utils.record.report import keep_pictures, write_page, write_report

EVIL = '<script>alert("x")</script>&'


class Reader(HTMLParser):
    """Collect tags, attributes and the text of cells."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_complete_and_escaped(tmp_path):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    tables = {"tags": [{"tag": EVIL, EVIL: 0.123456, "n": 1234, "none": None}] * 40, "empty": []}
    write_page(tmp_path / "report.html", EVIL, {"macro_f1": 0.5, "samples": 12.0}, tables, {EVIL: image})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and reader.text.count(EVIL) == 2 + 1 + 30  # title, column, cells
    assert {"macro f1", "0.5", "12", "0.1235", "1,234"} <= set(reader.text) and "empty" not in page
    assert "The first 30 of 40 rows" in page
    (picture,) = (link for link in reader.links if not link.startswith("#"))
    content = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    assert (np.asarray(Image.open(io.BytesIO(content))) == image).all()
    anchors = set(re.findall(r'id="(\w+)"', page))
    assert {link[1:] for link in reader.links if link.startswith("#")} == anchors


def test_pictures_are_kept_by_step_and_of_many_every_second(tmp_path):
    for step in range(0, 310, 10):
        write_report(tmp_path, {}, {"samples": np.full((2, 2, 3), step % 256, np.uint8)})
        keep_pictures(tmp_path, step, ["samples"])
    files = sorted((tmp_path / "plots/steps").rglob("*.png"))
    steps = [int(file.parent.name) for file in files]
    assert steps[0] == 0 and steps[-1] == 300 and steps[:3] == [0, 20, 40] and 12 < len(steps) <= 24
    assert all(np.asarray(Image.open(file)).max() == step % 256 for file, step in zip(files, steps))
