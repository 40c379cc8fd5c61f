"""The exports of a tagger: order of the tags, the files, what predict.py reads of them, and refusals.

tests/models/slow_wd14_tools.py has them in the programs that read them.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from ast import literal_eval

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from engine.exports.weights import load_predictor
from models.build import build_network
from models.export.parity import vary_weights
from models.export.tag_forms import (
    check_images,
    describe_changes,
    make_form,
    make_graph,
    to_bgr,
    to_wd_order,
    write_imgutils,
)
from models.image_model import ImageModel
from models.normalise import Normalise
from tests.models.test_export_formats import geometry, timm_config
from tests.support import export, thresholds_of
from utils.errors import UserError
from utils.vocabulary import Vocabulary, read_vocabulary, vocabulary_of

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


@pytest.fixture(scope="module")
def wd14(tmp_path_factory):
    """Return a folder with a file of wd14."""
    folder = tmp_path_factory.mktemp("wd14")
    thresholds = thresholds_of(VOCABULARY, {0: 0.5}, {(0, "new"): 0.1})
    report = export("wd14", *open_tagger(geometry()), folder, thresholds=thresholds)
    assert report["left_out"] == {"artist": 1} and report["constant"] == ["questionable", "sensitive"]
    return folder


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


def test_a_wd14_file_takes_and_gives_what_the_programs_expect(wd14):
    proto = onnx.load(wd14 / "model.onnx")
    (taken,), gives = proto.graph.input, proto.graph.output
    sizes = taken.type.tensor_type.shape.dim
    assert taken.name == "input" and sizes[0].dim_param and [size.dim_value for size in sizes[1:]] == [64, 64, 3]
    assert [value.name for value in gives] == ["output", "embedding"]
    assert [value.type.tensor_type.shape.dim[1].dim_value for value in gives] == [len(ORDERED), 20]
    assert proto.ir_version <= 9 and [entry.version for entry in proto.opset_import] == [18]
    assert {path.name for path in wd14.iterdir()} == {"model.onnx", "selected_tags.csv", "inv.npz", "README.md"}
    found = json.loads({entry.key: entry.value for entry in proto.metadata_props}["atelier"])
    assert vocabulary_of(found) == read_vocabulary(wd14 / "selected_tags.csv") == to_wd_order(VOCABULARY)[0]
    assert found["vocabulary"] == VOCABULARY.hash
    assert found["thresholds"] == [0.35, 0.35, 0.35, 0.35, 0.5, 0.1, 0.5, 0.5, 0.35]
    with open(wd14 / "selected_tags.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["best_threshold"]) for row in rows] == found["thresholds"]


def test_the_program_in_the_readme_prints_rating_and_tags(wd14, tmp_path):
    shutil.copytree(wd14, tmp_path, dirs_exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    found, image = literal_eval(done.stdout), torch.from_numpy(np.array(Image.open(tmp_path / "image.png")))
    with torch.no_grad():
        probs = open_tagger(geometry())[0](image.permute(2, 0, 1)[None])[1][0].tolist()
    probs = dict(zip(zip(VOCABULARY.categories, NAMES), probs))
    least = {(0, "new"): 0.1, (4, "ann_(x)"): 0.35}
    wanted = {key[1]: prob for key, prob in probs.items() if key[0] in (0, 4) and prob >= least.get(key, 0.5)}
    assert found["tags"] == pytest.approx(wanted, abs=1e-3) and wanted
    assert found["rating"] == max(("general", "explicit"), key=lambda name: probs[9, name])


@pytest.mark.parametrize(("form", "name"), [("imgutils", "test_resnet"), ("cl_tagger", "test_vit")])
def test_forms_give_what_the_network_gives(form, name):
    """`make_graph` compares; the stem that is turned round, too."""
    model, metadata = open_tagger(timm_config(name), side=160)
    make_graph(model, make_form(form, metadata["preprocessing"]), ROWS, [160, 160])
    to_bgr(model.network, [160, 160])


def test_networks_that_the_forms_cannot_hold_are_refused():
    model, _ = open_tagger(timm_config("repvit_m0_9"))  # its head is a norm and a layer
    with pytest.raises(UserError, match=r"^format: .*RepVit"):
        make_graph(model, make_form("wd14", {}), ROWS, [64, 64])
    with pytest.raises(UserError, match=r"^format: .*BGR"):
        to_bgr(build_network(timm_config("crossvit_9_240"), 3).eval(), [240, 240])  # two stems
    wrong, _ = open_tagger(geometry())
    wrong.network.forward_head = lambda features, pre_logits=False: features.mean((2, 3))
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

    assert steps(eval_resize="squash", pad="none", interpolation="area")[1] == ("resize", "box", [64, 64])
    assert steps(eval_crop=0.875, pad="none")[1:3] == [("resize", "bicubic", 73), ("center_crop", [64, 64])]
    assert steps()[1] == ("pad_to_size", "bicubic", [64, 64])
    assert not (tmp_path / "thresholds.csv").exists()


def test_a_form_that_is_none_is_refused(wd14, tmp_path):
    proto = onnx.load(wd14 / "model.onnx")
    (entry,) = proto.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | {"form": {"outputs": {"output": "probs"}, "layout": "CHWN"}})
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"model\.onnx .*form"):
        load_predictor(tmp_path / "model.onnx", torch.device("cpu"))
