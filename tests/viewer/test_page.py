"""format=page of export.py in a browser, from the disk: the answers of predict.py.

Grey, alpha, palettes and 16 bits; photographs of many heights that EXIF turns.
"""

import pytest

from models.interop.page import HASHES, PACKAGE
from tests.data.images.test_decoders import photo
from tests.in_process import run
from tests.models.test_export import write_classifier
from tests.support import ROOT, read_table, turned
from utils.io.memo import OURS

RUNTIME = [ROOT / OURS / PACKAGE / name for name in HASHES]


@pytest.mark.skipif(not all(file.is_file() for file in RUNTIME), reason="make test-view fetches it by npm")
def test_the_page_gives_the_answers_of_predict(browser, tmp_path):
    for height in range(9, 149):
        photo(height).save(tmp_path / f"{height}.jpg", exif=turned(height % 9))
    write_classifier(tmp_path / "w.safetensors")
    (tmp_path / "outputs").symlink_to(ROOT / "outputs")  # with ONNX Runtime for browsers
    run("export", ["format=page", "weights=w.safetensors", "output=out"], tmp_path)
    run(
        "predict",
        ["weights=w.safetensors", f"input=[*.jpg,{ROOT}/tests/data/corpora/pngsuite]", "output=x.csv"],
        tmp_path,
    )
    found = read_table(tmp_path / "x.csv")
    tab = browser.new_page()
    tab.goto(f"file://{tmp_path}/out/page.html", wait_until="commit")
    tab.set_input_files("#files", [tmp_path / row["path"] for row in found])
    tab.wait_for_selector("#results > li:nth-child(200)", timeout=300_000)
    shown = tab.locator(".name + li").all_text_contents()
    assert [text.split("  ")[0] for text in shown] == [row["class"] for row in found]
