"""The exports of a tagger: order of the tags, other networks, refusals; test_wd14_tools.py has the files."""

import pytest
import torch

from models.image_model import ImageModel
from models.interop.tag_forms import (
    check_images,
    describe_changes,
    make_graph,
    to_wd_order,
)
from models.normalise import Normalise
from models.weights.fit import reverse_channels
from tests.models.test_export_formats import geometry, make, timm_config
from tests.support import refuses
from utils.formats.preprocessing import Preprocessing
from utils.formats.vocabulary import Vocabulary

MEAN, STD = [0.45, 0.5, 0.6], [0.4, 0.5, 0.6]
NAMES = ("few", "many", "explicit", "painter", "general", "general", "ann_(x)", "new")
VOCABULARY = Vocabulary(NAMES, (0, 0, 9, 1, 9, 0, 4, 0), (3, 9, 4, 8, 5, 3, 2, 7), (10, 11, 12, 13, 14, 15, 16, 17))
ORDERED = ["general", "sensitive", "questionable", "explicit", "many", "new", "few", "general", "ann_(x)"]
ROWS = [4, -1, -1, 2, 1, 7, 0, 5, 6]


def open_tagger(config, side=64, vocabulary=VOCABULARY, **preprocessing):
    stated = {"mean": MEAN, "std": STD, "eval_crop": 1.0, "background": "white", "pad": "square", **preprocessing}
    model, metadata = make(config, len(vocabulary), (side, side), **stated)
    del metadata["class_names"], metadata["origin"]
    metadata |= {"task": {"name": "tagging"}, "output": "tags", **vocabulary.facts()}
    return ImageModel(model.network, Normalise(MEAN, STD, 3), "tags").eval(), metadata


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
    "name, side",
    [
        ("test_vit", 160),
        ("caformer_s18", 64),  # its head has two layers
        ("dpn48b", 64),  # a convolution
        ("crossvit_9_240", 240),  # two stems and two heads
    ],
)
def test_the_form_gives_what_the_network_gives(name, side):
    """`make_graph` compares; so does a stem that is turned round, here."""
    model, _ = open_tagger(timm_config(name), side=side)
    make_graph(model, ROWS, [side, side])
    images = torch.rand(2, 3, side, side)
    expected = model.network(images)
    reverse_channels(model.network)
    torch.testing.assert_close(model.network(images.flip(1)), expected, rtol=1e-4, atol=1e-4)


def test_networks_that_the_forms_cannot_hold_are_refused():
    model, _ = open_tagger(timm_config("test_resnet"))
    model.network.pretrained_cfg = {"classifier": "layer1", "first_conv": None}
    with refuses(r"^format: .*ResNet ends in Sequential"):
        make_graph(model, ROWS, [64, 64])
    with refuses("first convolution of ResNet is not known"):
        reverse_channels(model.network)
    wrong, _ = open_tagger(geometry())
    wrong.network.forward_head = lambda features, pre_logits=False: features.new_zeros(len(features), len(ROWS))
    with refuses(r"^tolerance: "):
        make_graph(wrong, ROWS, [64, 64])


def test_images_that_the_programs_prepare_otherwise_are_refused_or_warned_of(log):
    stated = Preprocessing(**open_tagger(geometry(), side=448)[1]["preprocessing"])
    for change in ({"image_size_hw": [64, 96]}, {"channels": 1}):
        with refuses("^format: "):
            check_images(stated.model_copy(update=change))
    for change, warnings in (({}, 0), ({"image_size_hw": [384, 384]}, 1), ({"background": "black"}, 1)):
        log.clear()
        check_images(stated.model_copy(update=change))
        assert len(log.records) == warnings
