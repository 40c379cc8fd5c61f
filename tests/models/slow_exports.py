"""Slow tests of exports: `python -m pytest -o python_files="slow_*.py" tests/models`."""

import numpy as np
import pytest
import torch

from models.config import TimmConfig
from models.export.onnx_file import open_session
from tests.models.test_export import assert_alike, write_both
from tests.models.test_export_formats import export_file, geometry, make, normalised, timm_config
from utils.errors import UserError


@pytest.mark.parametrize("config", [geometry(), timm_config("test_resnet")], ids=["convnextv2", "timm"])
def test_a_file_for_images_of_any_size(config, tmp_path):
    model, metadata = make(config)
    _, _, path = export_file(tmp_path, model, metadata, dynamic_size=True)
    session = open_session(path)
    for size in ((64, 64), (96, 160), (33, 71)):
        images, _ = normalised(model, 2, size)
        with torch.no_grad():
            wanted = model(images)[0].numpy()
        np.testing.assert_allclose(session(images.numpy())[0], wanted, atol=1e-4)


def test_a_network_of_one_size_is_refused_for_any(tmp_path):
    model, metadata = make(timm_config("test_vit3"), image_size_hw=(160, 160))
    with pytest.raises(UserError, match=r"^dynamic_size: true, but VisionTransformer"):
        export_file(tmp_path, model, metadata, dynamic_size=True)


@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_a_published_size_exports(size, tmp_path):
    model, metadata = make(geometry(size))
    assert export_file(tmp_path, model, metadata)[0] < 1e-2


def test_a_network_of_timm_on_grey_images_predicts_alike_as_both_files(tmp_path):
    model = TimmConfig(family="timm", name="resnet10t", in_channels=1, drop_path_rate=None)
    assert_alike(tmp_path, write_both(tmp_path, model))
