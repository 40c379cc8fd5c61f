"""The normalisation of bytes and of floats, in both memory formats."""

import torch

from models.normalise import Normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_bytes_and_floats_are_normalised_alike_in_both_memory_formats():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    normalise = Normalise(MEAN, STD, 3)
    planes, last = normalise(images), normalise(images.contiguous(memory_format=torch.channels_last))
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    torch.testing.assert_close(planes, ((images / 255.0 - mean) / std).float())
    assert torch.equal(last, planes) and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalise(images / 255.0), planes)
    assert torch.equal(normalise.undo(planes), images)
    assert torch.equal(normalise(images[..., 3:9]), planes[..., 3:9])  # in neither format
