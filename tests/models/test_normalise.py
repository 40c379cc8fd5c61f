"""The normalisation of bytes and of floats, in both memory formats."""

import pytest
import torch

from models.normalise import Normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_normalised_in_their_memory_format(memory_format):
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8).contiguous(memory_format=memory_format)
    found = Normalise(MEAN, STD, 3)(images)
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    torch.testing.assert_close(found, ((images / 255.0 - mean) / std).float())
    assert found.is_contiguous(memory_format=memory_format)


def test_formats_of_bytes_agree_to_the_bit_and_floats_to_the_last():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    normalise = Normalise(MEAN, STD, 3)
    planes = normalise(images)
    assert torch.equal(normalise(images.contiguous(memory_format=torch.channels_last)), planes)
    torch.testing.assert_close(normalise(images / 255.0), planes)
    assert torch.equal(normalise.undo(planes), images)
    part = normalise(images[..., 3:9])  # in neither format
    assert torch.equal(part, planes[..., 3:9])
