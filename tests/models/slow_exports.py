"""Slow tests of exports: `python -m pytest -o python_files="slow_*.py" tests/models`."""

import numpy as np
import onnx
import torch

from engine.exports.predictors import load_predictor
from tests.models.test_export_formats import timm_config
from tests.models.test_tag_exports import ROWS, VOCABULARY, open_tagger
from tests.support import export


def test_a_tagger_of_timm_in_fp16(tmp_path):
    model, metadata = open_tagger(timm_config("test_vit"), side=160, vocabulary=VOCABULARY)
    export("wd14", model, metadata, tmp_path, precision="fp16")
    weights = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in weights)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    probs = load_predictor(tmp_path / "model.onnx", torch.device("cpu")).predict(images)
    with torch.no_grad():
        np.testing.assert_allclose(probs[:, 4:], model(images)[1][:, ROWS[4:]].numpy(), atol=2e-2)
    assert not probs[:, 1:3].any()
