"""Export and prediction: round trips through the files that users hold, and refusals."""

import json
import re

import onnx
import pytest
import torch

from bench.measure import read_group
from engine.exports.config import FORMATS
from engine.exports.opened_task import open_task
from engine.exports.predictors import load_predictor
from engine.tasks.classification import ClassificationKind
from engine.tasks.config import ClassificationTaskConfig
from engine.tasks.kind import Setup
from models.config import ConvNeXtV2Config
from models.interop.onnx_file import write_onnx
from tests.support import ROOT, export, no_large_allocation, refuses
from utils.io.weights import read_weights, write_weights

CONVNEXT = ConvNeXtV2Config(
    family="convnextv2", name="tiny", in_channels=3, depths=[1, 2], dims=[16, 32], stem_stride=2, drop_path_rate=0.1,
    head_init_scale=1.0,
)  # fmt: skip
TASK = read_group(ClassificationTaskConfig, "task", "classification")
CPU = torch.device("cpu")
HUGE = CONVNEXT.model_dump() | {"dims": [8192, 8192]}


def load_image_model(path):
    weights = open_task(path)
    return weights.model, weights.metadata


PREPROCESSING = {
    "image_size_hw": [24, 32], "mean": [0.4] * 3, "std": [0.3] * 3, "eval_crop": 1.0, "interpolation": "bilinear",
    "channels": 3,
}  # fmt: skip


def write_classifier(path):
    torch.manual_seed(0)
    task = ClassificationKind().build(Setup(CONVNEXT, TASK, PREPROCESSING, {"class_names": ["ä", "b,c", "d"]}))
    metadata = {"task": TASK.model_dump(), "model": CONVNEXT.model_dump(), "step": 3, **task.metadata}
    write_weights(path, task.network.state_dict(), metadata)
    return task.eval()


@pytest.fixture(scope="module")
def exported(folder):
    """Return a folder with a classifier as w.safetensors and as model.onnx, and its task."""
    task = write_classifier(folder / "w.safetensors")
    assert write_onnx(*load_image_model(folder / "w.safetensors"), folder / "model.onnx", "fp32", 1e-4) < 1e-4
    return folder, task


def test_the_onnx_file_says_what_it_takes_and_gives(exported):
    """ONNX Runtime 1.15 (May 2023) reads opset 18 and IR 9. Nothing in the file names files of this machine."""
    proto = onnx.load(exported[0] / "model.onnx")
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["logits", "probs"]
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and [size.dim_value for size in shape[1:]] == [3, 24, 32]
    found = json.loads({entry.key: entry.value for entry in proto.metadata_props}["atelier"])
    assert found["class_names"] == ["ä", "b,c", "d"] and found["step"] == 3 and "license" not in found
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)] and proto.ir_version <= 9
    text = str(proto)
    assert ".py" not in text and "metadata_props" not in text.replace('metadata_props {\n  key: "atelier"', "")


def test_a_file_that_differs_too_much_is_not_kept(exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"the old one")
    with refuses("^tolerance: "):
        export("onnx", *load_image_model(exported[0] / "w.safetensors"), tmp_path, tolerance=1e-30)
    assert (tmp_path / "model.onnx").read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    "change, named",
    [({"task": {"name": "classificatoin"}}, "classification"), ({"class_names": None}, "class_names"),
     ({"preprocessing": {}}, r"preprocessing\.channels"), ({"model": HUGE}, "do not fit")],
)  # fmt: skip
def test_metadata_of_a_weight_file_are_checked(change, named, tmp_path):
    """Those of HUGE ask for gigabytes: they are compared with the header before anything is allocated."""
    write_classifier(path := tmp_path / "w.safetensors")
    tensors, metadata = read_weights(path)
    write_weights(path, tensors, {**metadata, **change})
    with no_large_allocation(), refuses(rf"(?s){path}.*{named}"):
        load_image_model(path)


def save_graph(path, metadata=None, location=None):
    """Write an ONNX file that returns its input; it has a tensor in another file where `location` names it."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[8] x) => (float[8] probs) { probs = Identity(x) }'
    )
    if location is not None:
        elsewhere = onnx.TensorProto.EXTERNAL
        weights = proto.graph.initializer.add(name="w", data_type=1, dims=[8], data_location=elsewhere)
        weights.external_data.add(key="location", value=location)
    if metadata is not None:
        onnx.helper.set_model_props(proto, {"atelier": metadata})
    path.write_bytes(proto.SerializeToString().replace("\xff".encode(), b"\xff "))


def test_an_onnx_file_that_names_other_files_is_refused(tmp_path):
    """export.py writes one file. ONNX Runtime would read what lies beside it, older versions what lies elsewhere."""
    save_graph(tmp_path / "m.onnx", "{}", "../secret.bin")
    with refuses(r"m\.onnx .*another file"):
        load_predictor(tmp_path / "m.onnx", CPU)


METADATA = {"output": "classes", "class_names": ["a", "b"], "preprocessing": PREPROCESSING}


@pytest.mark.parametrize(
    "metadata, named",
    [
        (None, "was not exported by Atelier"),
        ("{broken", "not a readable ONNX file"),
        ("broken: \xff", "not a readable ONNX file"),  # written as Latin-1
        (json.dumps({**METADATA, "preprocessing": {**PREPROCESSING, "std": [0.5]}}), "preprocessing"),
        (json.dumps({**METADATA, "output": "boxes"}), "output"),
        (json.dumps(METADATA), r"outputs \{'probs': \[8\]\}"),
    ],
)
def test_metadata_of_strangers_are_checked(metadata, named, tmp_path):
    save_graph(tmp_path / "m.onnx", metadata)
    with refuses(rf"m\.onnx .*{named}"):
        load_predictor(tmp_path / "m.onnx", CPU)


def test_the_help_of_export_names_every_format():
    (comment,) = re.findall(r"^format: .*# (.*)$", (ROOT / "conf/export.yaml").read_text(), re.MULTILINE)
    assert [name for part in comment.split(";") for name in part.split(":")[-1].strip().split(", ")] == list(FORMATS)
