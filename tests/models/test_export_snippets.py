"""The programs in the README.md of an export, run as they stand, see and say what predict.py does."""

import io
import json
import re
import runpy
from ast import literal_eval
from contextlib import chdir, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from data.images.prepare import preparer
from engine.exports.card import Card
from engine.exports.config import FORMATS
from engine.exports.opened_task import OpenedTask
from tests.models.test_export_formats import NAMES, geometry, make
from tests.support import export
from utils.formats.preprocessing import Preprocessing

PADDED = {"pad": "square", "eval_crop": 1.0}


def run_program(folder):
    """Run the program in the README.md of a folder; return what it prints and its variables."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (folder / "program.py").write_text(program)
    with chdir(folder), redirect_stdout(io.StringIO()) as printed:
        variables = runpy.run_path("program.py")
    return literal_eval(printed.getvalue()), variables


def smooth(width, height, mode):
    """Return a picture without noise, on which the rounding of two resizers would differ much."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, len(mode)), dtype=np.uint8)
    return Image.fromarray(coarse.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind, **settings):
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def half_transparent():
    """The right half is transparent over a colour that nobody sees."""
    picture = np.array(smooth(151, 91, "RGBA"))
    picture[:, 75:, 3] = 0
    return Image.fromarray(picture)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


DEEP = Image.fromarray((np.linspace(0, 65535, 90 * 150).reshape(90, 150)).astype(np.uint16))
FILES = {
    "alpha": encode(half_transparent(), "PNG"),
    "odd": encode(smooth(301, 97, "RGB"), "PNG"),
    "large JPEG": encode(smooth(1201, 807, "RGB"), "JPEG", quality=95),
    "turned JPEG": encode(smooth(613, 401, "RGB"), "JPEG", quality=95, exif=turned()),
    "grey": encode(smooth(99, 150, "L"), "PNG"),
    "16-bit grey": encode(DEEP, "PNG"),
    "CMYK": encode(smooth(400, 333, "CMYK"), "JPEG", quality=95),
    "palette": encode(smooth(150, 99, "RGB").quantize(32), "PNG", transparency=3),
}
STATED = [
    {"background": [255, 0, 40]},
    {"background": "drop", "interpolation": "bilinear", "eval_resize": "squash", "eval_crop": 1.0},
    {"shortest_px": 73, "channels": 1, "mean": [0.5], "std": [0.25]},
    {"shortest_px": 80, "background": 7, **PADDED},
    {"image_size_hw": [32, 96], "eval_crop": 0.95},
]


class Session:
    """ONNX Runtime's session of an export, which is compared with the model when it is written: the model itself."""

    def __init__(self, model, metadata):
        self._model, self._metadata = model, metadata

    def run(self, names, inputs):
        with torch.no_grad():
            outputs = dict(zip(self._model.form.outputs, self._model(torch.from_numpy(inputs["images"]))))
        return [outputs[name].numpy() for name in names or outputs]

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map={"atelier": json.dumps(self._metadata)})


def write_program(form, model, metadata, folder, monkeypatch):
    if form == "onnx":
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: Session(model, metadata))
        Card(OpenedTask(Path("w"), model, model.network, metadata), form, FORMATS[form], "model.onnx").write(folder)
    else:
        export(form, model, metadata, folder)


def predict(model, metadata, content):
    """Return the pixels that predict.py shows a network, and the outputs."""
    pixels = torch.from_numpy(preparer(metadata["preprocessing"], 10**7)(content, ""))[None]
    with torch.no_grad():
        return pixels, model(pixels)[-1][0].tolist()


@pytest.mark.parametrize("stated", STATED, ids=str)
def test_the_program_sees_what_predict_sees(stated, tmp_path, monkeypatch):
    """Both round to bytes after each resize: a few levels apart at most, and alike on average.

    A key that the description gets later cannot be left out of the card, as shortest_px once was.
    """
    assert set().union(*STATED) == Preprocessing.model_fields.keys()
    model, metadata = make(geometry(stages=2, in_channels=stated.get("channels", 3)), **stated)
    write_program("onnx", model, metadata, tmp_path, monkeypatch)
    for name, content in FILES.items():
        (tmp_path / "image.png").write_bytes(content)
        found, variables = run_program(tmp_path)
        ours, probs = predict(model, metadata, content)
        theirs = torch.from_numpy(variables["batch"]) * 255
        assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 5, name
        assert (theirs - ours).abs().mean() < 0.7, name
        assert {key: prob for prob, key in found} == pytest.approx(dict(zip(NAMES, probs)), abs=0.03)


SQUASHED = {"eval_resize": "squash", "eval_crop": 1.0, "interpolation": "bilinear", "background": "drop"}


@pytest.mark.parametrize("stated", [{"eval_crop": 0.95}, SQUASHED])
def test_the_program_of_timm_sees_and_says_what_predict_does(stated, tmp_path, monkeypatch):
    model, metadata = make(geometry(), shortest_px=80, **stated)
    write_program("timm", model, metadata, tmp_path, monkeypatch)
    (tmp_path / "image.png").write_bytes(FILES["alpha"])
    found, variables = run_program(tmp_path)
    pixels, wanted = predict(model, metadata, FILES["alpha"])
    # Both round to bytes after each resize: at most a few grey levels apart.
    assert (variables["batch"] - model.normalise(pixels)).abs().max() < 4.5 / 255 / min(
        metadata["preprocessing"]["std"]
    )
    assert {name: prob for prob, name in found} == pytest.approx(dict(zip(NAMES, wanted)), abs=0.02)
    assert max(wanted) - min(wanted) > 0.1


@pytest.mark.parametrize("form", ["timm", "onnx"])
def test_the_program_of_a_backbone_prints_its_features(form, tmp_path, monkeypatch):
    model, metadata = make(geometry(), num_classes=0)
    write_program(form, model, metadata, tmp_path, monkeypatch)
    (tmp_path / "image.png").write_bytes(FILES["odd"])
    _, wanted = predict(model, metadata, FILES["odd"])
    assert run_program(tmp_path)[0] == pytest.approx(wanted, rel=0.05, abs=0.05)
