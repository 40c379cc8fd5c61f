"""Taggers of others, in the layouts of their programs: in, out, predicted, calibrated, appended to.

The networks are timm's test networks with varied weights, and graphs of a mean. Images are prepared here as their
programs do: BGR levels (deepghs/imgutils:imgutils/tagging/wd14.py), or normalised RGB (fpgaminer/joytag:Models.py).
"""

import json

import numpy as np
import onnx
import pytest
import timm
import torch
from matplotlib import pyplot as plots
from safetensors.torch import load_file, save_file

from models.interop.parity import vary_weights
from tests.in_process import SHORT, run
from tests.support import assert_same_tensors, contents, rows
from tests.utils.io.test_hub import server  # noqa: F401 (a fixture)
from utils.io.files import read_json

TAGS = """tag_id,name,category,count
9999999,general,9,9
9999998,sensitive,9,8
9999997,questionable,9,7
9999996,explicit,9,6
1,hat,0,7
2,bob,4,5
"""
CONFIG = """{"architecture": "%s", "num_classes": 6, "model_args": %s, "pretrained_cfg": {"input_size": [3, 64, 64],
"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "crop_pct": 1.0}}"""
NETWORKS = {  # with arguments of SmilingWolf/wd-vit-tagger-v3
    "test_vit": '{"act_layer": "gelu_tanh", "img_size": 64, "class_token": false, "global_pool": "avg"}',
    "test_convnext2": "{}",
}
GRAPH = """<ir_version: 9, opset_import: ["": 18]>
g (float[B, 3, 64, 64] x) => (float[B, 3] logits) <int64[2] axes = {2, 3}>
{ logits = ReduceMean<keepdims=0>(x, axes) }"""
DATA = ["data=image_folder", "data.root=images", "runtime.device=cpu", "runtime.threads=1", "runtime.workers=0"]
TAGGING = ["task=tagging", "task.min_count=1", "task.rating_s=general", *SHORT[2:], *DATA, "loop.total_steps=0"]
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 3), np.uint8)


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with tagged images, each of a colour, and taggers of timm."""
    for name in ("images", *NETWORKS):
        (folder / name).mkdir()
    for number, colour in enumerate(COLOURS):
        plots.imsave(folder / f"images/{number}.png", np.tile(colour, (64, 64, 1)))
        (folder / f"images/{number}.txt").write_text("hat, new, rating:g")
    for name, arguments in NETWORKS.items():
        (folder / name / "config.json").write_text(CONFIG % (name, arguments))
        (folder / name / "selected_tags.csv").write_text(TAGS)
        network = vary_weights(timm.create_model(name, num_classes=6, **json.loads(arguments)))
        save_file(network.state_dict(), folder / name / "model.safetensors")
    return folder


def predict(place, weights):
    """Return the probability of a hat in each image."""
    run("predict", [f"weights={weights}", "input=images", "output=x.jsonl", "threshold=0.0", "device=cpu"], place)
    return [row["probs"]["general"]["hat"] for row in rows(place / "x.jsonl")]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_tagger_comes_in_and_goes_out_as_it_was(name, place, server):  # noqa: F811
    network = timm.create_model(f"local-dir:{place / name}", pretrained=True).eval()
    images = torch.tensor(COLOURS / 255).float()[:, :, None, None].expand(8, 3, 64, 64)
    wanted = network((images.flip(1) - 0.5) / 0.5).sigmoid()[:, 4].detach()
    np.testing.assert_allclose(predict(place, f"local-dir:{name}"), wanted, atol=1e-4)
    server.files = contents(place / name)
    run("finetune", [*TAGGING, f"task.vocabulary={name}", f"init_from=hf-hub:me/{name}", f"run_dir=run_{name}"], place)
    run("export", ["format=timm", f"run_dir=run_{name}", "output=out"], place)
    assert_same_tensors(*(load_file(place / folder / "model.safetensors") for folder in (name, "out")))
    assert (place / "out/selected_tags.csv").read_text() == TAGS
    assert NETWORKS[name] in json.dumps(read_json(place / "out/config.json"))


def test_a_graph_is_described_by_the_tags_beside_it(place, tmp_path):
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "model.onnx")
    (tmp_path / "top_tags.txt").write_text("a\nb\nhat")
    wanted = torch.tensor((COLOURS[:, 2] / 255 - 0.40821073) / 0.27577711).sigmoid()
    np.testing.assert_allclose(predict(place, tmp_path), wanted, atol=1e-4)
    run("evaluate", [f"weights={tmp_path}", "calibrate=true", *DATA, "output=found"], place)
    assert (tmp_path / "model_thresholds.csv").is_file()
    assert read_json(place / "found/metrics.json")["tags_without_positives"] == 0  # a and b are unknown


def test_a_tagger_of_others_is_calibrated_and_gets_new_tags(place):
    run("evaluate", ["weights=test_vit", "calibrate=true", *DATA, "output=found"], place)
    assert (place / "test_vit/model_thresholds.csv").is_file()
    run("finetune", [*TAGGING, "task.append_to=test_vit", "run_dir=more"], place)
    assert read_json(place / "more/config.json")["augment"]["image_size_hw"] == [64, 64]
