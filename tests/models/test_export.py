"""Export and prediction: round trips through the files that users hold, and refusals."""

import json

import numpy as np
import onnx
import pytest
import torch
from omegaconf import OmegaConf

from engine.tasks.classification import ClassificationTask
from engine.tasks.config import ClassificationTaskConfig
from models.config import ConvNeXtV2Config, TimmConfig
from models.onnx_export import export_classifier
from models.predictor import load_classifier, load_predictor
from utils.config import CONF
from utils.errors import UserError
from utils.weights import write_weights

CONVNEXT = ConvNeXtV2Config(
    family="convnextv2", name="tiny", in_channels=3, depths=[1, 2], dims=[16, 32], stem_stride=2, drop_path_rate=0.1,
    head_init_scale=1.0,
)  # fmt: skip
RESNET = TimmConfig(family="timm", name="resnet10t", in_channels=1, drop_path_rate=None)
TASK = ClassificationTaskConfig(
    name="classification",
    label_smoothing=0.0,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    allow_missing_classes=False,
    keep_head=False,
)
CPU = torch.device("cpu")


def write_classifier(path, model):
    torch.manual_seed(0)
    channels = model.in_channels
    preprocessing = {
        "image_size_hw": [24, 32], "mean": [0.4] * channels, "std": [0.3] * channels, "eval_crop": 1.0,
        "interpolation": "bilinear", "channels": channels,
    }  # fmt: skip
    task = ClassificationTask(model, TASK, class_names=["ä", "b,c", "d"], preprocessing=preprocessing)
    metadata = {"model": model.model_dump(), "step": 3, **task.metadata()}
    write_weights(path, task.network.state_dict(), metadata)
    return task.eval()


@pytest.mark.parametrize("model", [CONVNEXT, RESNET], ids=["convnextv2", "timm"])
def test_weight_file_and_onnx_file_predict_alike(model, tmp_path):
    task = write_classifier(tmp_path / "w.safetensors", model)
    classifier, metadata = load_classifier(tmp_path / "w.safetensors")
    difference = export_classifier(classifier, metadata, tmp_path / "model.onnx", tolerance=1e-4)
    assert difference < 1e-4
    images = torch.randint(0, 256, (3, model.in_channels, 24, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = task.network(task.normalise(images)).softmax(1).numpy()
    for name in ("w.safetensors", "model.onnx"):
        predictor = load_predictor(tmp_path / name, CPU)
        assert predictor.class_names == ["ä", "b,c", "d"]
        assert predictor.preprocessing["image_size_hw"] == [24, 32]
        np.testing.assert_allclose(predictor.probs(images), wanted, atol=1e-5)


def test_the_onnx_file_says_what_it_takes_and_gives(tmp_path):
    write_classifier(tmp_path / "w.safetensors", CONVNEXT)
    export_classifier(*load_classifier(tmp_path / "w.safetensors"), tmp_path / "model.onnx", tolerance=1e-4)
    proto = onnx.load(tmp_path / "model.onnx")
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["logits", "probs"]
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and [size.dim_value for size in shape[1:]] == [3, 24, 32]
    found = json.loads({entry.key: entry.value for entry in proto.metadata_props}["atelier"])
    assert found["class_names"] == ["ä", "b,c", "d"] and found["step"] == 3


def test_a_file_that_differs_too_much_is_not_kept(tmp_path):
    write_classifier(tmp_path / "w.safetensors", CONVNEXT)
    (tmp_path / "model.onnx").write_bytes(b"the old one")
    with pytest.raises(UserError, match="tolerance: ONNX Runtime differs from PyTorch by .* the file was not kept"):
        export_classifier(*load_classifier(tmp_path / "w.safetensors"), tmp_path / "model.onnx", tolerance=1e-30)
    assert (tmp_path / "model.onnx").read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "w.safetensors"]


def test_pretrained_weights_are_no_classifier(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, {"model": {}})
    with pytest.raises(UserError, match="weights: .* holds no class names, .* fine-tune it first"):
        load_classifier(tmp_path / "w.safetensors")


def test_foreign_and_broken_onnx_files_are_refused(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    with pytest.raises(UserError, match="weights: .*broken.onnx is no readable ONNX file"):
        load_predictor(tmp_path / "broken.onnx", CPU)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="weights: .*foreign.onnx was not exported by Atelier"):
        load_predictor(tmp_path / "foreign.onnx", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny", "base"])
def test_every_published_size_exports(size, tmp_path):
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"model/convnextv2_{size}.yaml"))
    model = ConvNeXtV2Config.model_validate({**values, "head_init_scale": 1.0})
    torch.manual_seed(0)
    preprocessing = {
        "image_size_hw": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "channels": 3, "eval_crop": 1.0,
        "interpolation": "bilinear",
    }  # fmt: skip
    task = ClassificationTask(model, TASK, class_names=["a", "b", "c"], preprocessing=preprocessing)
    write_weights(
        tmp_path / "w.safetensors",
        task.network.state_dict(),
        {"model": model.model_dump(), "step": 0, **task.metadata()},
    )
    assert export_classifier(*load_classifier(tmp_path / "w.safetensors"), tmp_path / "m.onnx", tolerance=1e-3) < 1e-3
