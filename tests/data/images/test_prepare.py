"""Images for networks: NumPy's resize is torch's to the bit, files are as the view of an evaluation, in order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.steps import evaluation_views
from data.images import resize as module
from data.images.decode import Decoder
from data.images.prepare import read_images
from data.images.resize import resize

STATED = {
    "channels": 3, "image_size_hw": [24, 32], "interpolation": "bicubic", "eval_crop": 0.9, "eval_resize": "crop",
    "pad": "none", "mean": [0.5] * 3, "std": [0.5] * 3, "background": "white",
}  # fmt: skip
NO_TORCH = SimpleNamespace(modules={})  # of a process that has not imported it


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_numpy_resizes_as_torch_to_the_bit(interpolation, channels, monkeypatch):
    draw = np.random.default_rng(0)
    for number in range(40):
        sides, resized = draw.integers(1, 300, (2, 2))
        resized = resized if number else (1, 1)  # 300 times as small: the weights have all their bits
        sides = sides if number else (900, 7)
        pixels = draw.integers(0, 256, (*sides, channels), dtype=np.uint8)
        pixels = pixels if number % 2 else np.where(pixels > 127, 255, 0).astype(np.uint8)  # overshoots are clipped
        by_torch = resize(pixels, resized, interpolation)
        with monkeypatch.context() as patched:
            patched.setattr(module, "sys", NO_TORCH)
            assert np.array_equal(resize(pixels, resized, interpolation), by_torch), (sides, resized)


def test_a_large_job_imports_torch(monkeypatch):
    monkeypatch.setattr(module, "sys", NO_TORCH)
    pixels = np.zeros((5, 5, 3), np.uint8)
    monkeypatch.setattr(module, "_done", [module._SMALL_JOB])
    monkeypatch.setattr(module, "_resize_rows", lambda *_: pytest.fail("NumPy"))
    assert resize(pixels, (3, 3), "bilinear").shape == (3, 3, 3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"eval_resize": "squash"}, {"pad": "square", "background": [9, 99, 200]}, {"shortest_px": 40},
     {"channels": 1, "mean": [0.5], "std": [0.5], "interpolation": "bilinear"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("threads", [0, 3])
def test_files_are_as_the_view_of_an_evaluation(changes, threads, tmp_path, monkeypatch):
    stated = STATED | changes
    draw = np.random.default_rng(1)
    paths = [tmp_path / f"{number}.{form}" for number, form in enumerate(("png", "jpg", "png", "jpg", "webp"))]
    for path, hw in zip(paths, ((40, 51), (300, 97), (9, 13), (64, 48), (8, 900))):
        Image.fromarray(draw.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(path)
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    decoder = Decoder(stated["channels"], 10**6, stated["background"], stated.get("shortest_px"))
    view = evaluation_views(stated)["images"]
    expected = [view(torch.from_numpy(decoder(path.read_bytes(), path.name)).permute(2, 0, 1)) for path in paths]
    monkeypatch.setattr(module, "sys", NO_TORCH)
    *found, reason = read_images([*paths, broken], stated, 10**6, threads)
    assert "not an image" in reason
    assert all(map(np.array_equal, found, [image.numpy() for image in expected]))
