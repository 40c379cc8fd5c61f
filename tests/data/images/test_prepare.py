"""NumPy's resize is torch's to the bit; test_start.py compares whole predictions without torch."""

from types import SimpleNamespace

import numpy as np
import pytest

from data.images import resize as module
from data.images.resize import resize

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
