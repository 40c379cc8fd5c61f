"""Taggers of timm's networks in fp16."""

import numpy as np
import onnx
import pytest
import torch

from engine.exports.weights import load_predictor
from tests.models.test_export_formats import timm_config
from tests.models.test_tag_exports import ROWS, VOCABULARY, open_tagger
from tests.support import export


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_of_timm_in_fp16(name, tmp_path):
    model, metadata = open_tagger(timm_config(name), side=160, vocabulary=VOCABULARY)
    report = export("wd14", model, metadata, tmp_path, precision="fp16")
    assert report["onnx_max_abs_diff"] < 0.1
    proto = onnx.load(tmp_path / "model.onnx")
    assert {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)} == {1}
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    probs = load_predictor(tmp_path / "model.onnx", torch.device("cpu")).predict(images)
    with torch.no_grad():
        np.testing.assert_allclose(probs[:, 4:], model(images)[1][:, ROWS[4:]].numpy(), atol=2e-2)
    assert not probs[:, 1:3].any()
