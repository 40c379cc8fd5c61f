"""The exports of task=diffusion that diffusers alone reads: they give the pictures of the run."""

import pytest
from safetensors import safe_open

from tests.engine.test_diffusion_exports import compare_lora, compare_whole, place, wanted  # noqa: F401 (fixtures)


def test_a_lora_of_diffusers_beside_the_base_gives_the_pictures_of_the_run(place, wanted):  # noqa: F811
    compare_lora("lora_diffusers", place, wanted)
    with safe_open(place / "lora_lora_diffusers/pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["modelspec.license"] == "openrail++"


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_a_folder_of_diffusers_gives_the_pictures_of_the_run(name, place, wanted):  # noqa: F811
    compare_whole(name, "diffusers", place, wanted)
