"""The programs in the README.md of an export, run as they stand: their predictions are ours, on every background."""

import io
import re
import runpy
import shutil
from ast import literal_eval
from contextlib import chdir, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.transforms import EvalTransform
from engine.exports.card import write_card
from engine.exports.weights import Weights
from models.fcmae import FCMAE
from tests.models.test_export_formats import NAMES, geometry, make
from tests.support import export, read_image

PADDED = {"pad": "square", "eval_crop": 1.0, "interpolation": "bilinear"}


def run_program(folder):
    """Run the program in the README.md of a folder; returns the value that it prints."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (folder / "program.py").write_text(program)
    with chdir(folder), redirect_stdout(io.StringIO()) as printed:
        runpy.run_path("program.py")
    return literal_eval(printed.getvalue())


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    export("onnx", *make(geometry(stages=2)), folder)
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("form", "preprocessing", "background"),
    [
        ("timm", {}, "drop"),
        ("transformers", {}, "white"),
        ("onnx", {}, "white"),
        ("onnx", PADDED, [255, 0, 40]),
        ("pth", PADDED, "white"),
    ],
)
def test_a_snippet_predicts_as_we_do(form, preprocessing, background, onnx_file, tmp_path):
    """The right half of the picture is transparent over a colour that nobody sees."""
    model, metadata = make(geometry(stages=4 if form == "timm" else 2), background=background, **preprocessing)
    if form == "onnx":  # the file is the same for every preprocessing
        shutil.copy(onnx_file, tmp_path)
        write_card(Weights(Path("w"), model, model.network, metadata), tmp_path, "onnx", "model.onnx")
    else:
        export(form, model, metadata, tmp_path)
    draw_picture(tmp_path)
    found = run_program(tmp_path)
    found = dict(zip(NAMES, found)) if form == "pth" else {name: prob for prob, name in found}
    wanted = predict(model, metadata, tmp_path)[1][0]
    assert found == pytest.approx(dict(zip(metadata["class_names"], wanted.tolist())), abs=0.02)
    assert wanted.max() - wanted.min() > 0.1


def test_a_program_reads_the_encoder_of_an_fcmae(tmp_path):
    model, metadata = make(geometry(stages=2), num_classes=0)
    sizes = {"patch_px": 32, "mask_ratio": 0.5, "decoder_dim": 8, "decoder_depth": 1}
    whole = FCMAE(encoder=model.network, **sizes, norm_pix_loss=True, execution="dense")
    export("pth", model, metadata, tmp_path, whole=whole)
    draw_picture(tmp_path)
    assert run_program(tmp_path) == pytest.approx(predict(model, metadata, tmp_path)[0][0].tolist(), rel=0.05, abs=0.02)


def draw_picture(folder):
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((150, 91), Image.Resampling.BICUBIC))
    picture[:, 75:, 3] = 0
    Image.fromarray(picture).save(folder / "image.png")


def predict(model, metadata, folder):
    """Return the outputs of our model for the picture in a folder."""
    background = metadata["preprocessing"].get("background", "white")
    pixels = torch.from_numpy(read_image(folder / "image.png", 3, 10**6, background)).permute(2, 0, 1)
    with torch.no_grad():
        return model(EvalTransform(metadata["preprocessing"])(pixels)[None])
