"""The programs in the README.md of an export, run as they stand: their predictions are ours, on every background."""

import re
import subprocess
import sys
from ast import literal_eval

import numpy as np
import pytest
import torch
from PIL import Image

from data.transforms import EvalTransform
from tests.models.test_export_formats import geometry, make
from tests.support import export, read_image


def transparent_picture(path):
    """Write a smooth picture whose right half is transparent over a colour that nobody sees."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((150, 91), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    pixels[:, 75:, 3] = 0
    Image.fromarray(pixels).save(path)


PADDED = {"pad": "square", "eval_crop": 1.0, "interpolation": "area"}


@pytest.mark.parametrize(
    ("form", "preprocessing", "background"),
    [("timm", {}, "drop"), ("transformers", {}, "white"), ("onnx", {}, "white"), ("onnx", PADDED, [255, 0, 40])],
)
def test_a_snippet_predicts_as_we_do(form, preprocessing, background, tmp_path):
    model, metadata = make(geometry(), background=background, **preprocessing)
    export(form, model, metadata, tmp_path)
    transparent_picture(tmp_path / "image.png")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {name: prob for prob, name in literal_eval(done.stdout)}
    pixels = torch.from_numpy(read_image(tmp_path / "image.png", 3, 10**6, background)).permute(2, 0, 1)
    with torch.no_grad():
        wanted = model(EvalTransform(metadata["preprocessing"])(pixels)[None])[1][0]
    assert found == pytest.approx(dict(zip(metadata["class_names"], wanted.tolist())), abs=0.02)
    assert wanted.max() - wanted.min() > 0.1
