"""task.tag_weights: the weight of a sample, in a literal case."""

import pytest
import torch

pytest.importorskip("diffusers", reason="make install-sdxl")

from data.tags.tag_weights import TagWeightsConfig
from engine.tasks.diffusion import TagBalance


def test_a_sample_weighs_the_mean_of_its_tags():
    """The median count is 2, so tags weigh 2, 1, 1/2 and 0: of the images 0.25 * 2 + 0.25 + 0.5 / 2 = 1 on average."""
    rule = TagWeightsConfig(power=1.0, low=0.1, high=4.0, factors={})
    facts = {"counts": [1, 2, 4, 2], "factors": [1.0, 1.0, 1.0, 0.0], "shares": [0.25, 0.25, 0.5, 0.0]}
    balance = TagBalance(rule, facts)
    assert balance.weights.tolist() == pytest.approx([2.0, 1.0, 0.5, 0.0]) and not balance.state_dict()
    batch = {"tags": torch.tensor([0, 3, 1, 2, 3]), "tags_offsets": torch.tensor([0, 2, 4, 4, 5])}
    assert balance(batch).tolist() == pytest.approx([2.0, 0.75, 1.0, 1.0])
    doubled = TagBalance(rule, {**facts, "shares": [1.0, 0.0, 0.0, 0.0]})
    assert doubled(batch).tolist() == pytest.approx([1.0, 0.375, 1.0, 1.0])
