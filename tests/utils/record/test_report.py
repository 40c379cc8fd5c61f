"""An evaluation's page: complete in one file, escaped, and short however long its tables are."""

import base64
import io
import re
from html import escape

import numpy as np
from PIL import Image

from utils.record.report import keep_pictures, write_html, write_report

EVIL = '<script>alert("x")</script>&'


def test_a_page_is_complete_and_escaped(tmp_path):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    tables = {"tags": [{"tag": EVIL, EVIL: 0.123456, "n": 1234, "none": None}] * 40, "empty": []}
    write_html(tmp_path / "report.html", EVIL, {"macro_f1": 0.5, "samples": 12.0}, tables, {EVIL: image})
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in page and page.count(escape(EVIL)) == 2 + 1 + 30  # title, column, cells
    assert re.search("macro f1 +0.5\nsamples +12</pre>", page) and re.search("0.1235 +1,234\n", page)
    assert "empty" not in page
    (content,) = re.findall('src="data:image/png;base64,(.*?)"', page)
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) == image).all() and page.count("src=") == 1


def test_pictures_are_kept_by_step_and_of_many_every_second(tmp_path):
    for step in range(0, 310, 10):
        write_report(tmp_path, {}, {"samples": np.full((2, 2, 3), step % 256, np.uint8)})
        keep_pictures(tmp_path, step, ["samples"])
    steps = sorted(int(file.parent.name) for file in (tmp_path / "plots/steps").rglob("*.png"))
    assert steps[-1] == 300 and steps[:3] == [0, 20, 40] and 12 < len(steps) <= 24
