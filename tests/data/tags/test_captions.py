"""Captions: where they come from, how they vary, and what is said of bad ones."""

import json

import numpy as np
import torch
from PIL import Image

from data.tags.captions import CaptionConfig, describe_captions
from tests.data.collection.test_collection import load
from tests.support import refuses

PLAIN = {
    "source": "caption", "keep_first": 0, "shuffle": False, "tag_dropout": 0.0,
    "caption_dropout": 0.0, "dropout_to": "empty", "prefix": "", "lines": "one_of", "emphasis": False,
    "keep_tokens_separator": None, "suffix": "",
}  # fmt: skip


def config(**changed):
    return CaptionConfig(**{**PLAIN, **changed})


def collection_of(root, files, images=("a.png", "b.png", "c.png")):
    """Return a collection of images and other files, by name; a text, or objects of which each is a line."""
    for name in images:
        Image.new("L", (2, 2)).save(root / name)
    for name, content in files.items():
        if isinstance(content, list):
            content = "\n".join(map(json.dumps, content))
        (root / name).write_text(content)
    return load(root, root / ".cache")


def texts(collection, **changed):
    return ["\n".join(config(**changed).read(collection.row(row))) for row in range(len(collection))]


SIDECARS = {
    "a.txt": "A cat, sleeping.\n", "a.json": json.dumps({"tags": ["character:Hatsune_Miku", "hat_\\(x\\)", "^_^"]}),
    "b.json": json.dumps({"tag_string": "1girl long_hair rating:g", "caption": "  "}),
}  # fmt: skip


def test_captions_of_sidecars_and_tags_in_words(tmp_path):
    collection = collection_of(tmp_path, SIDECARS)
    assert texts(collection) == ["A cat, sleeping.", "1girl, long hair, rating:g", ""]
    assert texts(collection, source="tags")[0] == "hatsune miku, hat (x), ^_^"


def test_emphasis_stays_whole_and_brackets_of_tags_are_escaped(tmp_path):
    marked = config(emphasis=True, shuffle=True, keep_first=1)
    text, generator = r"a, (b, c:1.2), d \(e\), :(", torch.Generator().manual_seed(1)
    drawn = {marked.arrange(text, generator) for _ in range(50)}
    assert len(drawn) == 6 and all(each.startswith("a, ") and "(b, c:1.2)" in each for each in drawn)
    assert marked.split(text) == ["a", "b", "c", "d (e)", ":("] != config().split(text)
    assert texts(collection_of(tmp_path, SIDECARS), source="tags", emphasis=True)[0] == r"hatsune miku, hat \(x\), ^_^"


def test_lines_of_a_caption_are_alternatives(tmp_path):
    girl = "A girl stands in the rain, alone and cold."
    collection = collection_of(
        tmp_path, {"a.txt": f"1girl, rain\n\n {girl}\n", "b.json": json.dumps({"caption": ["x", "y"]})}
    )
    assert texts(collection) == [f"1girl, rain\n{girl}", "x\ny", ""] and collection.row(0).tags == ("1girl", "rain")
    assert texts(collection, lines="first") == ["1girl, rain", "x", ""]
    assert texts(collection, lines="join")[:2] == [f"1girl, rain, {girl}", "x, y"]
    found = config().read(collection.row(0))
    drawn = [config().draw(found, torch.Generator().manual_seed(key), config().arrange)[0] for key in range(40)]
    assert set(drawn) == set(found) and 10 < drawn.count(girl) < 30
    assert vary(girl, shuffle=True, tag_dropout=1.0) == (girl, False)  # a sentence is not cut into tags


# Variation.


def vary(text, key=0, **changed):
    """Return a caption of a training sample, and whether it is dropped."""
    generator, varied = torch.Generator().manual_seed(key), config(**changed)
    return varied.draw([text], generator, varied.arrange)


def test_a_plain_caption_is_left_as_it_is():
    assert vary(" One,two\nthree ") == (" One,two\nthree ", False)
    assert vary("a", prefix="sks") == ("sks, a", False) and vary("", prefix="sks") == ("sks", False)
    around = {"prefix": "a photo of ", "suffix": " at night"}
    found = [vary(text, **around)[0] for text in ("a dog", "A photo of a cat")]
    assert found == ["a photo of a dog at night", "A photo of a cat at night"]


def test_the_first_tags_stay_and_the_others_are_shuffled():
    text = "a,b,\nc,  d,e,f,g"
    found = {vary(text, key, shuffle=True, keep_first=2, prefix="p")[0] for key in range(40)}
    assert len(found) > 20
    for caption in found:
        tags = caption.split(", ")
        assert tags[:3] == ["p", "a", "b"] and sorted(tags[3:]) == list("cdefg")
    assert vary(text, 3, shuffle=True) == vary(text, 3, shuffle=True)


def test_tags_are_dropped_in_their_order_with_the_probability_stated():
    text = ", ".join(map(str, range(5000)))
    tags = [int(tag) for tag in vary(text, tag_dropout=0.3, keep_first=5)[0].split(", ")]
    assert tags[:5] == list(range(5)) and tags == sorted(tags) and abs(len(tags) / 5000 - 0.7) < 0.03
    assert vary(text, tag_dropout=1.0, keep_first=1) == ("0", False)


def test_captions_are_dropped_with_the_probability_stated():
    found = [vary("a, b", key, caption_dropout=0.2, shuffle=True, prefix="p") for key in range(1000)]
    assert abs(np.mean([dropped for _, dropped in found]) - 0.2) < 0.04
    assert all((caption == "") == dropped for caption, dropped in found)
    assert config(caption_dropout=1.0).arrange("a", torch.Generator()) == "a"


def test_tags_beside_separators_stay_at_both_ends():
    captions = config(keep_tokens_separator="|||", suffix="s", shuffle=True)
    text = "miku, 1girl, |||, late, kantoku, solo, ||| a b, c"
    drawn = {captions.arrange(text, torch.Generator().manual_seed(key)) for key in range(50)}
    assert len(drawn) == 6
    for caption in drawn:
        tags = caption.split(", ")
        assert tags[:2] == ["miku", "1girl"] and tags[5:] == ["a b", "c", "s"]
    assert captions.arrange(text) == "miku, 1girl, late, kantoku, solo, a b, c, s"


# What is said of them.


def test_sources_and_bad_captions_are_counted_and_named(tmp_path, log):
    rows = [
        {"path": "a.png", "caption": "a cat"}, {"path": "b.png", "caption": " ", "tags": ["x"]},
        {"path": "c.png", "caption": " ", "tags": []},
    ]  # fmt: skip
    collection = collection_of(tmp_path, {"manifest.jsonl": rows})
    every = np.arange(3)
    assert describe_captions(collection, every, config()) == "caption 1; tags 1; empty 1"
    assert describe_captions(collection, every[:2], config(source="tags")) == "tags 1; caption 1"
    assert "1 images" in log.messages[-1] and "'c.png'" in log.messages[-1]
    with refuses(r"^data\.root: none of the 1 images"):
        describe_captions(collection, every[2:], config())
