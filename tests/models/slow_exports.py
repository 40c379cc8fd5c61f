"""Slow tests of exports: `python -m pytest -o python_files="slow_*.py" tests/models`."""

import numpy as np
import onnx
import onnxruntime
import torch

from engine.exports.weights import load_predictor
from tests.in_process import SHORT, make_images, run
from tests.models.test_export_formats import timm_config
from tests.models.test_tag_exports import ROWS, VOCABULARY, open_tagger
from tests.support import export
from utils.formats.vocabulary import read_vocabulary


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


def test_a_repository_with_new_tags_gives_the_old_ones_to_the_bit(tmp_path):
    for file in make_images(tmp_path / "images").rglob("*.png"):
        file.with_suffix(".txt").write_text("square, rating:g")
    data, outputs = ["task=tagging", "task.min_count=1", "data=image_folder", "data.root=images"], []
    small = ["model=convnextv2_atto", "model.depths=[1,1,1,1]", "model.dims=[8,8,16,16]", *SHORT]  # of four stages
    run("train", [*small, *data, "run_dir=run", "augment.image_size_hw=[64,64]"], tmp_path)
    for file in (tmp_path / "images").rglob("*.txt"):
        file.write_text(f"character:{file.parent.name}, square, new{file.stem}")
    run("finetune", [*data, "task.append_to=run", "run_dir=more", "runtime.device=cpu"], tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.float32)
    for name in ("run", "more"):
        run("export", ["format=wd_repository", f"run_dir={name}", f"output={name}/repo"], tmp_path)
        names = read_vocabulary(tmp_path / name / "repo/selected_tags.csv").names
        file = onnxruntime.InferenceSession(tmp_path / name / "repo/model.onnx")
        rows = [names.index(tag) for tag in ("general", "sensitive", "questionable", "explicit", "square")]
        outputs.append(file.run(None, {file.get_inputs()[0].name: images})[0][:, rows])
    assert np.array_equal(*outputs)
