"""Exports as their users load them: equal logits, equal preprocessing; backbones: test_export_snippets.py.

The networks have varied weights, so that logits vary between images. Nothing here uses a network connection.
"""

import socket
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import yaml
from transformers import AutoModelForImageClassification

from engine.exports.card import Card
from engine.exports.config import FORMATS
from engine.exports.opened_task import OpenedTask
from models import config as schemas
from models.build import build_network
from models.config import ConvNeXtV2Config
from models.image_model import ImageModel
from models.interop import libraries
from models.interop.inference_form import to_inference_form
from models.interop.metadata import licence_of
from models.interop.onnx_file import write_onnx
from models.interop.parity import vary_weights
from models.layers import GRN
from models.normalise import Normalise
from models.predictor import open_session
from tests import support
from tests.support import refuses
from utils.io.files import read_json

NAMES = ["ä", "b,c", "d"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def geometry(size="small", stem_stride=4, stages=4, in_channels=3):
    depths, dims = ([2, 2, 6, 2], [40, 80, 160, 320]) if size == "atto" else ([1, 1, 2, 1], [8, 12, 16, 20])
    return ConvNeXtV2Config(
        family="convnextv2", name=f"convnextv2_{size}", in_channels=in_channels, depths=depths[:stages],
        dims=dims[:stages], stem_stride=stem_stride, drop_path_rate=0.1, head_init_scale=1.0,
    )  # fmt: skip


def timm_config(name, in_channels=3, **more):
    return schemas.timm_config(name).model_copy(update={"in_channels": in_channels, **more})


def make(config, num_classes=3, image_size_hw=(64, 64), **preprocessing):
    """Return a model with varied weights, and its metadata."""
    values = {
        "image_size_hw": list(image_size_hw), "mean": MEAN[: config.in_channels], "std": STD[: config.in_channels],
        "eval_crop": 0.875, "interpolation": "bicubic", "eval_resize": "crop", "channels": config.in_channels,
    } | preprocessing  # fmt: skip
    network = vary_weights(build_network(config, num_classes))
    output = "classes" if num_classes else "features"
    model = ImageModel(network, Normalise(values["mean"], values["std"], config.in_channels), output).eval()
    origin = {"source": "a.pt", "layout": "official", "license": "cc-by-nc-4.0"}
    metadata = {"task": {"name": "classification"}, "model": config.model_dump(), "preprocessing": values, "step": 7,
                "output": output, "origin": origin}  # fmt: skip
    return model, metadata | ({"class_names": NAMES} if num_classes else {})


def export(form, model, metadata, folder, whole=None):
    return support.export(form, model, metadata, folder, whole, tolerance=1e-4)


def normalised(model, count=3, size=(64, 64)):
    images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(3))
    return images, model.normalise(images)


def assert_near(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# --- timm


def test_timm_loads_the_folder_and_the_file(tmp_path):
    model, metadata = make(geometry("atto"))
    assert export("timm", model, metadata, tmp_path)["max_abs_diff"] < 1e-5
    _, inputs = normalised(model)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        wanted = model.network(inputs)
        assert wanted.std(dim=0).mean() > 0.05
        assert_near(loaded(inputs), wanted)
        hugging = AutoModelForImageClassification.from_pretrained(tmp_path).eval()  # transformers builds timm's network
        assert_near(hugging(inputs).logits, wanted)
        assert list(hugging.config.id2label.values()) == metadata["class_names"]
        path = str(tmp_path / "model.safetensors")
        assert_near(timm.create_model("convnextv2_atto", num_classes=3, checkpoint_path=path).eval()(inputs), wanted)
    assert read_json(tmp_path / "config.json")["label_names"] == NAMES
    assert "license: cc-by-nc-4.0" in (tmp_path / "README.md").read_text().splitlines()


def test_texts_of_strangers_are_text_in_the_card(tmp_path):
    texts = {"source": "a\n---\n<script>`` x", "layout": "[a](https://x)", "license": 'mit"\ntags: [forged]'}
    model, metadata = make(geometry())
    names = ["{{ names }}", "a, <b>", *map(str, range(110))]
    for origin in ("no object", texts):
        weights = OpenedTask(Path("w"), model, model.network, {**metadata, "origin": origin, "class_names": names})
        Card(weights, "safetensors", FORMATS["safetensors"], "model.safetensors").write(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    assert (front["license"], front["license_name"]) == ("other", texts["license"]) and lines.count("---") == 2
    spellings = {"CC-BY-NC 4.0": "cc-by-nc-4.0", "Apache_2.0": "apache-2.0", "My Own 2.0": "My Own 2.0"}
    for stated, shown in spellings.items():
        assert licence_of({"origin": {"license": stated}}) == shown
    (shown,) = (line for line in lines if line.startswith("112 classes: "))
    assert shown.startswith("112 classes: `{{ names }}`, `a, <b>`, `0`, ") and shown.endswith(", `97` and 12 more.")
    assert r"Trained from ```a\n---\n<script>`` x``` (layout `[a](https://x)`)." in lines


# --- what cannot be expressed


@pytest.mark.parametrize(
    "form, network, preprocessing, reason",
    [
        ("timm", {"stem_stride": 2}, {}, "a stem of stride 2"),
        ("timm", {}, {"pad": "square"}, "augment.pad=square"),
        ("timm", {}, {"image_size_hw": [64, 96]}, "64 x 96"),
    ],
)
def test_what_a_format_cannot_express_is_refused_with_the_reason(form, network, preprocessing, reason, tmp_path):
    model, metadata = make(geometry(**network))
    metadata["preprocessing"] |= preprocessing
    with refuses(rf"^format: .*{reason}"):
        export(form, model, metadata, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_wrong_converter_is_found_and_nothing_is_kept(tmp_path, monkeypatch):
    """With weights as small as drawn ones, its logits would pass; a copy with varied weights shows it."""
    right = libraries.filter_state

    def wrong(network, state):
        flipped = {name: tensor.flip(0) for name, tensor in state.items() if name.endswith("dwconv.weight")}
        return right(network, {**state, **flipped})

    monkeypatch.setattr(libraries, "filter_state", wrong)
    model, metadata = make(geometry())
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1e-3)
    with refuses(r"^tolerance: a copy with varied weights"):
        export("timm", model, metadata, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_timm_loads_any_network_of_its_own(tmp_path):
    model, metadata = make(timm_config("test_resnet", in_channels=1, channels=[16, 24, 32, 64]))
    export("timm", model, metadata, tmp_path)
    loaded, inputs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(inputs), model.network(inputs))


# --- ONNX


def test_fp16_sums_in_float32(tmp_path):
    """Squares of GRN's input exceed the range of fp16 here: activations of some hundreds, which GRN divides again."""
    model, metadata = make(geometry())
    with torch.no_grad():
        for stage in model.network.stages:
            for block in stage:
                block.pwconv1.weight.mul_(100.0)
                block.pwconv2.weight.mul_(0.01)
    path = tmp_path / "model.onnx"
    difference, proto = write_onnx(model, metadata, path, "fp16", 5e-2), onnx.load(path)
    images, _ = normalised(model)
    session = open_session(path, torch.device("cpu"))
    assert difference < 5e-2 and np.isfinite(session.run(None, {"images": images.numpy()})[0]).all()
    assert path.stat().st_size < 0.6 * sum(p.nbytes for p in model.parameters()) + 60_000
    ends = (*proto.graph.input, *proto.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {onnx.TensorProto.FLOAT}


def test_the_rewritten_network_is_the_same_function():
    """GRN's shift in the bias, one product for its factor, GELU spelled out: equal in float64."""
    model, _ = make(geometry())
    model = ImageModel(model.network.double(), model.normalise.double(), "classes").eval()
    rewritten = to_inference_form(model)
    assert not any(isinstance(module, GRN) for module in rewritten.modules())
    pixels = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.normalise(pixels).double()
        torch.testing.assert_close(rewritten.network(features), model.network(features), atol=1e-10, rtol=1e-10)
