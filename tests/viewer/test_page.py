"""format=page of export.py in a browser, from the disk: the answers of predict.py, and where it is unsure.

Grey, alpha, palettes and 16 bits; photographs of many heights that EXIF turns.
"""

import pytest

from models.interop.page import HASHES, PACKAGE
from tests.data.images.test_decoders import photo
from tests.in_process import SHORT, SMALL_MODEL, make_images, run
from tests.support import ROOT, rows, turned
from utils.io.memo import OURS
from utils.io.weights import read_weights, write_weights

RUNTIME = [ROOT / OURS / PACKAGE / name for name in HASHES]
GREY = ["task=tagging", "task.min_count=1", "model.in_channels=1", "augment.mean=[0.4]", "augment.std=[0.3]"]


@pytest.mark.skipif(not all(file.is_file() for file in RUNTIME), reason="make test-view fetches it by npm")
@pytest.mark.parametrize("words", [[], GREY])
def test_the_page_gives_the_answers_of_predict(words, browser, tmp_path):
    for height in range(9, 149):
        photo(height).save(tmp_path / f"{height}.jpg", exif=turned(height % 9))
    make_images(tmp_path / "images", "ABCDEF")
    run(
        "finetune",
        [*SMALL_MODEL, *SHORT, "data.root=images", "run_dir=run", "model.head_init_scale=3.0", *words],
        tmp_path,
    )
    file = tmp_path / "run/weights/last_weights.safetensors"
    tensors, metadata = read_weights(file)
    write_weights(file, tensors, metadata | {"thresholds": [0.3] * len(tensors["head.bias"])})
    (tmp_path / OURS / PACKAGE).symlink_to(ROOT / OURS / PACKAGE)
    run("export", ["format=page", f"weights={file}", "output=out"], tmp_path)
    run("predict", [f"weights={file}", f"input=[*.jpg,{ROOT}/tests/data/corpora/pngsuite]", "output=x.jsonl"], tmp_path)
    found = rows(tmp_path / "x.jsonl")
    tab = browser.new_page()
    tab.goto(f"file://{tmp_path}/out/page.html", wait_until="commit")
    tab.set_input_files("#files", [tmp_path / row["path"] for row in found])
    tab.wait_for_selector("#results > li:nth-child(200)", timeout=300_000)
    shown = tab.locator(".name + li").all_text_contents()
    wanted = ["unsure" if row.get("unsure", "" in row.values()) else [*row.values()][1] for row in found]
    assert [text.split("  ")[0] for text in shown] == [text.split(", ")[0] for text in wanted] and "unsure" in wanted
