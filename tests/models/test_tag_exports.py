"""The exports of a tagger: order of the tags, other networks, refusals; test_wd14_tools.py has the files."""

import json

import pytest

from models.build import build_network
from models.image_model import ImageModel, Normalise
from models.interop.parity import vary_weights
from models.interop.tag_forms import (
    check_images,
    describe_changes,
    make_form,
    make_graph,
    to_bgr,
    to_wd_order,
    write_imgutils,
)
from tests.models.test_export_formats import geometry, timm_config
from utils.errors import UserError
from utils.formats.vocabulary import Vocabulary

MEAN, STD = [0.45, 0.5, 0.6], [0.4, 0.5, 0.6]
NAMES = ("few", "many", "explicit", "painter", "general", "general", "ann_(x)", "new")
VOCABULARY = Vocabulary(NAMES, (0, 0, 9, 1, 9, 0, 4, 0), (3, 9, 4, 8, 5, 3, 2, 7), (10, 11, 12, 13, 14, 15, 16, 17))
ORDERED = ["general", "sensitive", "questionable", "explicit", "many", "new", "few", "general", "ann_(x)"]
ROWS = [4, -1, -1, 2, 1, 7, 0, 5, 6]


def open_tagger(config, side=64, vocabulary=VOCABULARY, **preprocessing):
    preprocessing = {
        "image_size_hw": [side, side], "mean": MEAN, "std": STD, "eval_crop": 1.0, "interpolation": "bicubic",
        "eval_resize": "crop", "channels": 3, "background": "white", "pad": "square",
    } | preprocessing  # fmt: skip
    network = vary_weights(build_network(config, len(vocabulary)))
    metadata = {"task": {"name": "tagging"}, "model": config.model_dump(), "preprocessing": preprocessing, "step": 7,
                "output": "tags", **vocabulary.facts()}  # fmt: skip
    return ImageModel(network, Normalise(MEAN, STD, 3), "tags").eval(), metadata


def test_the_order_of_wd_files_fills_every_place(caplog):
    ordered, rows = to_wd_order(VOCABULARY)
    assert list(ordered.names) == ORDERED and rows == ROWS
    assert ordered.categories == (9, 9, 9, 9, 0, 0, 0, 0, 4)
    assert ordered.tag_ids[:5] == (9999999, 9999998, 9999997, 9999996, 11) and ordered.counts[:2] == (5, 0)
    bare, rows = to_wd_order(Vocabulary(("painter",), (1,), (1,), (1,)))
    assert bare.categories == (9, 9, 9, 9, 0, 4) and rows == [-1] * 6
    changes = describe_changes(VOCABULARY, bare)
    assert changes["left_out"] == {"general": 4, "artist": 1, "character": 1} and changes["tags"] == 6
    assert changes["constant"] == ["no_character", "no_general_tag", "questionable", "sensitive"]
    assert "no training image had a rating" in caplog.text


@pytest.mark.parametrize(
    ("form", "name", "side"),
    [
        ("imgutils", "test_resnet", 160),
        ("cl_tagger", "test_vit", 160),
        ("wd14", "caformer_s18", 64),  # its head has two layers
        ("wd14", "dpn48b", 64),  # a convolution
        ("wd14", "crossvit_9_240", 240),  # two stems and two heads
    ],
)
def test_forms_give_what_the_network_gives(form, name, side):
    """`make_graph` compares; the stem that is turned round, too."""
    model, metadata = open_tagger(timm_config(name), side=side)
    make_graph(model, make_form(form, metadata["preprocessing"]), ROWS, [side, side])
    to_bgr(model.network, [side, side])


def test_networks_that_the_forms_cannot_hold_are_refused():
    model, _ = open_tagger(timm_config("test_resnet"))
    model.network.pretrained_cfg = {"classifier": "layer1", "first_conv": None}
    with pytest.raises(UserError, match=r"^format: .*ResNet ends in Sequential"):
        make_graph(model, make_form("wd14", {}), ROWS, [64, 64])
    with pytest.raises(UserError, match=r"^format: .*BGR"):
        to_bgr(model.network, [64, 64])
    wrong, _ = open_tagger(geometry())
    wrong.network.forward_head = lambda features, pre_logits=False: features.new_zeros(len(features), len(ROWS))
    with pytest.raises(UserError, match=r"^tolerance: "):
        make_graph(wrong, make_form("wd14", {}), ROWS, [64, 64])


def test_images_that_the_programs_prepare_otherwise_are_refused_or_warned_of(log):
    stated = {"image_size_hw": [448, 448], "channels": 3, "pad": "square", "background": "white"}
    for form, change in (("wd14", {"image_size_hw": [64, 96]}), ("cl_tagger", {"channels": 1})):
        with pytest.raises(UserError, match="^format: "):
            check_images(form, stated | change)
    for change, warnings in (({}, 0), ({"image_size_hw": [384, 384]}, 1)):
        log.clear()
        check_images("wd14", stated | change)
        assert len(log.records) == warnings


def test_imgutils_gets_our_preprocessing_in_its_own_words(tmp_path):
    def steps(**change):
        write_imgutils(tmp_path, VOCABULARY, None, open_tagger(geometry(), **change)[1]["preprocessing"])
        return [tuple(step.values())[:3] for step in json.loads((tmp_path / "preprocess.json").read_text())["test"]]

    assert steps(eval_resize="squash", pad="none", interpolation="bilinear")[1] == ("resize", "bilinear", [64, 64])
    assert steps(eval_crop=0.875, pad="none")[1:3] == [("resize", "bicubic", 73), ("center_crop", [64, 64])]
    assert steps()[1] == ("pad_to_size", "bicubic", [64, 64])
    assert not (tmp_path / "thresholds.csv").exists()
