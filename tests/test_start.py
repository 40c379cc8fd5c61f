"""What a command does not import: a refusal needs the schemas alone, and jobs on files need no torch."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

from data.augment.steps import evaluation_views
from data.images.decode import Decoder
from tests.in_process import make_images
from tests.support import make_collection
from utils.config.help import ROOT

_HEAVY = "{'torch', 'torchvision', 'timm', 'scipy', 'matplotlib', 'diffusers', 'transformers', 'wandb', 'onnx'}"


def run_and_list(script, words, folder, shown=_HEAVY):
    """Run a command in a process of its own; return its status and error, and which modules of `shown` it imported."""
    code = (
        "import atexit, runpy, sys; _, sys.path[0], *sys.argv = sys.argv; "
        f"atexit.register(lambda: print(sorted({shown} & set(sys.modules)))); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", code, str(ROOT), str(ROOT / f"{script}.py"), *words]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "script, words, key",
    [
        ("train", ["data.rot=PATH"], "data.rot"),
        ("train", ["data.root=no/folder"], "data.root"),
        ("finetune_sdxl", ["loop.batch_size=many", "data.root=x"], "loop.batch_size"),
        ("prepare", ["data.root=no/folder", "dry_run=true"], "data.root"),
        ("evaluate", ["weights=w", "risk=2"], "risk"),
        ("predict", ["weights=w", "input=i", "output=o", "threshold=2"], "threshold"),
        ("export", ["format=none"], "format"),
    ],
)
def test_a_refusal_imports_the_schemas_alone(script, words, key, tmp_path):
    status, error, imported = run_and_list(script, words, tmp_path)
    assert (status, imported) == (2, "[]") and key in error


COPY = ["job=copy", "job.to=copies"]
VOCABULARY = ["job=vocabulary", "job.output=tags.csv", "job.min_count=1"]


@pytest.mark.parametrize("words", [["job=check"], ["job=manifest"], ["job=filter", "job.find=tag_1"], COPY, VOCABULARY])
def test_jobs_on_files_need_no_torch(words, tmp_path):
    make_images(tmp_path / "images")
    for number, image in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        image.with_suffix(".txt").write_text(f"tag_{number % 2}")
    status, error, imported = run_and_list("prepare", [*words, "data.root=images"], tmp_path)
    assert status == 0 and "torch" not in imported, error


def test_an_interrupt_in_the_imports_is_one_line_and_help_needs_no_open_output():
    code = "from utils.start import begin; begin(''); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    words = ["sh", "-c", f"{sys.executable} {ROOT}/train.py --help >&-"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_start_of_a_classifier_opens_no_wing(tmp_path):
    make_collection(tmp_path / "images", per_class=4, classes="AB", validation=50)  # fewer are judged by features
    wings = {
        "sdxl", "models.predictor", "models.weights", "engine.tasks.head", "engine.tasks.tagging", "engine.exports",
        "engine.run.remote_copy", "engine.run.lr_finder", "engine.measures.tag_scores", "optim.alone", "optim.ema",
        "data.tags.tag_index", "data.layouts.manifest", "data.layouts.corrections",
        "data.layouts.remote", "data.images.record_store", "data.augment.on_device", "data.augment.windows",
        "utils.io.hub", "utils.record.trackers",
    }  # fmt: skip
    steps = ["loop.total_steps=1", "loop.batch_size=8", "augment.image_size_hw=[32,32]", "runtime.workers=0"]
    words = ["data.root=images", "run_dir=run", "runtime.device=cpu", *steps]
    status, error, imported = run_and_list("train", words, tmp_path, wings)
    assert (status, imported) == (0, "[]"), error


def test_a_prediction_by_an_onnx_file_needs_no_torch_and_has_the_same_pixels(tmp_path):
    """The network of the file returns its input, so its features are the pixels of the view of an evaluation."""
    make_images(tmp_path / "images")
    stated = {
        "channels": 3, "image_size_hw": [24, 20], "interpolation": "bicubic", "eval_resize": "crop", "eval_crop": 0.9,
        "pad": "none", "background": "white", "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, 24, 20])
    features = onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["batch", 3 * 24 * 20])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Flatten", ["images"], ["features"])], "pixels", [images], [features]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, {"atelier": json.dumps({"output": "features", "preprocessing": stated})})
    onnx.save(model, tmp_path / "model.onnx")
    words = ["weights=model.onnx", "input=images", "output=found.npz", "device=cpu"]
    status, error, imported = run_and_list("predict", words, tmp_path, "{'torch', 'torchvision', 'timm'}")
    assert (status, imported) == (0, "[]"), error
    with np.load(tmp_path / "found.npz") as found:
        for path, pixels in zip(found["paths"], found["vectors"], strict=True):
            decoded = Decoder(3, 10**6)((tmp_path / path).read_bytes(), path)
            view = evaluation_views(stated)["images"](torch.from_numpy(decoded).permute(2, 0, 1))
            assert np.array_equal(pixels, (view.float() / 255.0).flatten())
