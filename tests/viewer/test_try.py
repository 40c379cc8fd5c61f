"""/try: what a network says of an image, as predict.py says it; bad images; files outside the roots; the page."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from data.stream.source import UnreadableImage
from engine.exports.predictors import load_predictor
from engine.tasks.kind import Setup
from engine.tasks.tagging import TaggingKind
from tests.data.images.test_corpora import PNG_END, png_header
from tests.engine.test_tagging import CONFIG, MODEL
from tests.in_process import configure, run
from tests.support import encoded, make_collection, refuses, thresholds_of, turned
from tests.viewer.conftest import HOSTILE, add_data, assert_accessible, sees
from utils.formats.thresholds import write_thresholds
from utils.formats.vocabulary import Vocabulary
from utils.io.files import read_json
from utils.io.weights import hash_tensors, write_weights
from viewer.networks import Networks

CPU = torch.device("cpu")
VOCABULARY = Vocabulary(
    ("general", "sensitive", "black_hair", "^_^", HOSTILE, "painter", "ann_(x)"), (9, 9, 0, 0, 0, 1, 4), (5,) * 7,
    tuple(range(7)),
)  # fmt: skip
PREPROCESSING = {
    "image_size_hw": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "eval_crop": 1.0, "interpolation": "bilinear",
    "channels": 3, "pad": "square", "background": [9, 9, 9],
}  # fmt: skip
CAPTION = ["text.spaces=true", "text.escape=true", "text.rating=first"]


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def runs(folder):
    """Return a folder with a run of a tagger with thresholds, and its collection."""
    make_collection(folder / "images", per_class=4, classes="AB", validation=2)
    weights = folder / "tagger/weights/best_weights.safetensors"
    task = TaggingKind().build(Setup(MODEL, CONFIG, PREPROCESSING, {**VOCABULARY.facts(), "tag_priors": [0.5] * 7}))
    torch.manual_seed(0)
    torch.nn.init.normal_(task.network.head.weight, std=2.0)
    metadata = {"task": CONFIG.model_dump(), "model": MODEL.model_dump(), "step": 1, **task.metadata}
    write_weights(weights, task.network.state_dict(), metadata)
    table = thresholds_of(VOCABULARY, {0: 0.5, 4: 0.1}, {(0, "black_hair"): 0.9, (0, HOSTILE): 0.01})
    write_thresholds(weights.with_name("best_thresholds.csv"), table, hash_tensors(task.network.state_dict())[:16])
    (folder / "tagger/config.json").write_text('{"script": "finetune"}')
    add_data(folder / "tagger", root=str(folder / "images"))
    return folder


def open_networks(runs, *words):
    return Networks([runs], lambda path: load_predictor(path, CPU), configure("view", words)[0].text)


@pytest.mark.parametrize("profile, limit", [("per_tag", 0.9), ("high_recall", 0.5)])
def test_tags_and_caption_are_those_of_predict(runs, tmp_path, profile, limit):
    content = encoded(noise(40, 60, 3), exif=turned())
    (tmp_path / "a.jpg").write_bytes(content)
    bars, caption, seen, _ = open_networks(runs, *CAPTION).ask(str(runs / "tagger"), profile, content, "a.jpg")
    words = [f"weights={runs / 'tagger'}", "input=a.jpg", f"profile={profile}", "device=cpu", "workers=0", *CAPTION]
    for output in ("texts/", "rows.jsonl"):
        run("predict", [*words, f"output={output}"], tmp_path)
    assert caption == (tmp_path / "texts/a.txt").read_text().strip() and seen.size == (32, 32)
    row = read_json(tmp_path / "rows.jsonl")
    chosen = {category: {tag: prob for tag, prob, is_chosen, _ in tags if is_chosen} for category, tags in bars.items()}
    said = {**row["probs"], "rating": {row["rating"]: row["rating_prob"]}}
    assert {name: tags for name, tags in chosen.items() if tags} == {
        name: pytest.approx(tags, abs=2e-6) for name, tags in said.items()
    }
    assert sum(map(len, bars.values())) == 7
    assert [least for tag, _, _, least in bars["general"] if tag == "black_hair"] == [pytest.approx(limit)]


def test_an_image_of_too_many_pixels_is_not_decoded(runs):
    content = png_header(11_000, 11_000) + PNG_END
    with pytest.raises(UnreadableImage, match=r"^a\.png: .*more than the 100,000,000 that max_pixels allows"):
        open_networks(runs).ask(str(runs / "tagger"), "per_tag", content, "a.png")


# --- paths


@pytest.fixture
def place(tmp_path):
    """Return roots with a WD folder, and files outside that links, `..` or thresholds could lead to."""
    for name in ("in/wd", "in/run/weights", "out"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("in/wd/model.onnx", "in/wd/selected_tags.csv", "in/old.pth", "in/w.safetensors", "out/w.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "in/link.safetensors").symlink_to(tmp_path / "out/w.safetensors")
    (tmp_path / "in/folder").symlink_to(tmp_path / "out")
    (tmp_path / "in/run/weights/best_weights.safetensors").symlink_to(tmp_path / "out/w.safetensors")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in/loop")
    (tmp_path / "in/tags.safetensors").write_bytes(b"")
    (tmp_path / "in/tags_thresholds.csv").symlink_to("/etc/passwd")
    return tmp_path


@pytest.mark.parametrize("text, word", [
    ("in/wd", None), ("in/w.safetensors", None), ("in/wd/model.onnx", None), ("in/../in/wd", None),
    ("out/w.safetensors", "file below"), ("in/../out/w.safetensors", "file below"), ("/etc/passwd", "file below"),
    ("in/link.safetensors", "file below"), ("in/folder/w.safetensors", "file below"), ("in/run", "file below"),
    ("in/tags.safetensors", "file below"), ("in/old.pth", "file below"), ("in", "weights"),
    ("in/none", "does not exist"), ("hf:a/b@main", "file below"), ("in/\0", "null"), ("in/" + "x" * 5000, "long"),
    ("in/loop", "loop|symbolic links|does not exist"), ("", "file below"),
])  # fmt: skip
def test_weights_are_found_below_the_roots_alone(place, text, word, monkeypatch):
    monkeypatch.chdir(place)
    networks = Networks([place / "in"], None, None)
    if word is None:
        assert networks.find(text).is_relative_to(place / "in")
    else:
        with refuses(rf"(?s)^weights: .*({word})"):
            networks.find(text)


def test_a_network_is_kept_and_read_again_when_it_changes(place):
    read = []
    networks = Networks([place], read.append, None)
    file = place / "in/w.safetensors"
    networks.get(file), networks.get(file)
    os.utime(file, ns=(1, 1))
    networks.get(file)
    assert read == [file] * 2


# --- the page


def test_an_image_is_answered_in_the_browser(page, address, runs):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{address}/try")
    drop = page.locator("input[type=file]")
    drop.set_input_files({"name": f"{HOSTILE}.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("known format").wait_for(timeout=240_000)
    page.evaluate(
        """bytes => {
          const files = new DataTransfer()
          files.items.add(new File([new Uint8Array(bytes)], "pasted.png"))
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: files}))
        }""",
        list(encoded(noise(40, 60, 3), "PNG")),
    )
    sees(page, "pasted.png, as the network sees it")
    dropped = {"1.png": (runs / "images/train/A/000.png").read_bytes(), "2.png": encoded(noise(40, 60, 3), "PNG")}
    drop.set_input_files(
        [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in dropped.items()]
    )
    sees(page, "2.png, as the network sees it", "1.png, as the network sees it")
    assert page.locator("img[onerror]").count() == 0 and page.locator(".bar").count() == 14
    page.get_by_role("button", name="Copy caption").first.click()
    page.wait_for_function("async () => await navigator.clipboard.readText() != ''")  # the server writes it
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".seen ~ .mono").first.inner_text()
    assert_accessible(page)
    box = page.get_by_label("weights")
    box.fill("/etc/passwd"), box.press("Enter")
    sees(page, "file below")
    page.reload()
    sees(page, "No image yet")
