"""A VAE of its own for SDXL: where it is read from, its values, and the same values in an export."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="make install-sdxl")

from diffusers import StableDiffusionXLPipeline

from sdxl.config import SDXLConfig
from sdxl.files.checkpoints import save_single_file
from sdxl.files.family import PREFIXES, draw_networks, list_configs
from sdxl.files.names import part_state, to_single_file
from sdxl.networks import load_networks, load_vae, settle_model
from sdxl.step import decode_latents, encode_images
from sdxl.vae import latent_scale, unlike_sdxls
from tests.small_sdxl import V_ZTSNR, write_base
from tests.support import assert_same_tensors, refuses
from utils.io.files import read_json, write_json

NOISE = {**V_ZTSNR, "dtype": torch.float32, "facts": {"title": "toy"}}
MEAN, STD = [0.1, -0.2, 0.3, 0.4], [0.5, 1.0, 1.5, 2.0]
STATISTICS = {"latents_mean": MEAN, "latents_std": STD}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A VAE with other weights than the base's, as folder and in the files of other programs."""
    place, networks = tmp_path_factory.mktemp("vae"), draw_networks()
    torch.manual_seed(1)
    for parameter in networks["vae"].parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    write_base(place / "model", networks)
    save_single_file(place / "model.safetensors", networks, **NOISE)
    single = to_single_file("vae", part_state("vae", networks["vae"]))
    save_file(single, place / "prefixed.safetensors")
    plain = {name.removeprefix(PREFIXES["vae"]): one for name, one in single.items()}
    save_file({**plain, "loss.logvar": torch.ones(1)}, place / "comfyui.safetensors")
    save_file({"v": torch.ones(1)}, place / "other.safetensors")
    return place


def configure(vae, path=None, **values):
    other = {"name": "x", "path": path, "frozen_dtype": "float32", "in_channels": 3}
    return SDXLConfig(family="sdxl", vae=str(vae), vae_values=values, **other)


def state(place, folder, **values):
    """Return a folder of a VAE whose config.json states values."""
    file = shutil.copytree(place / "model/vae", folder / "stated") / "config.json"
    write_json(file, {**read_json(file), **values})
    return file.parent


@pytest.mark.parametrize(
    "name",
    ["model", "model/vae", "model/vae/diffusion_pytorch_model.safetensors", "model.safetensors", "prefixed.safetensors",
     "comfyui.safetensors"],
)  # fmt: skip
def test_a_vae_is_read_from_folders_and_files(name, place):
    assert_same_tensors(load_vae(place / name).state_dict(), load_networks(place / "model")["vae"].state_dict())


@pytest.mark.parametrize(
    "stated, given, mean, factor",
    [
        ({}, {}, [0.0] * 4, [0.13025] * 4),
        ({"scaling_factor": 0.2, "shift_factor": 0.1}, {}, [0.1] * 4, [0.2] * 4),
        ({"shift_factor": 0.1, "latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, {}, [0.1] * 4, [0.13025] * 4),
        ({"shift_factor": 0.1}, {"latents_mean": [0.0] * 4, "scaling_factor": 0.5}, [0.0] * 4, [0.5] * 4),
        ({"shift_factor": 0.1}, STATISTICS, MEAN, [0.13025 / one for one in STD]),
        (STATISTICS, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, [0.0] * 4, [0.13025] * 4),
    ],
)  # fmt: skip
def test_values_are_given_or_stated_or_sdxls(stated, given, mean, factor, place, tmp_path):
    folder = state(place, tmp_path, **stated)
    settled = settle_model(configure(folder, **given))
    assert settle_model(settled) == settled  # and later changes of the file change nothing
    assert bool(unlike_sdxls(settled.vae_values)) == (mean != [0.0] * 4 or factor != [0.13025] * 4)
    found = torch.stack(latent_scale(load_vae(folder, settled.vae_values))).flatten(1)
    torch.testing.assert_close(found, torch.tensor([mean, factor]))


@pytest.mark.parametrize(
    "values, said",
    [
        (STATISTICS, "latents_mean.*with which SDXL's U-Net was not trained"),
        ({"latents_mean": MEAN}, "latents_mean"),
        ({"shift_factor": "x"}, "latents_mean"),
        ({"scaling_factor": -1.0}, "scaling_factor"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"act_fn": "relu"}, "act_fn"),
    ],
)
def test_stated_values_are_refused(values, said, place, tmp_path):
    folder = state(place, tmp_path, **values)
    with refuses(rf"^model\.vae: .*{said}"), torch.device("meta"):
        load_vae(folder, settle_model(configure(folder)).vae_values)


def test_what_is_no_vae_or_of_another_width_is_refused(place, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(**{**list_configs(tiny=True)["vae"], "latent_channels": 16}).save_pretrained(tmp_path / "wide")
    torch.save({}, tmp_path / "vae.pt")
    for path, said in (
        (place / "other.safetensors", "no VAE"), (tmp_path / "wide", "16"), (tmp_path / "vae.pt", "no .safetensors"),
        (tmp_path / "none", "does not exist"), (tmp_path, "diffusion_pytorch_model"),
    ):  # fmt: skip
        with refuses(rf"^model\.vae: .*{said}"):
            load_vae(path)


def test_exports_carry_the_values_for_programs_that_do_not_read_them(place, tmp_path):
    """A single file has them in its tensors, a folder in its config, where diffusers applies them."""
    values = settle_model(
        configure(place / "model", padding_mode="reflect", scaling_factor=0.2, **STATISTICS)
    ).vae_values
    networks = {**draw_networks(), "vae": load_vae(place / "model", values)}
    latents, image = torch.randn(1, 4, 8, 8), torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    mean, factor = latent_scale(networks["vae"])
    encoded = encode_images(networks["vae"], image)
    plain = encode_images(load_vae(place / "model"), image)
    assert not torch.allclose(encoded[0], plain[0], atol=1e-3)  # other padding
    save_single_file(tmp_path / "file.safetensors", networks, **NOISE)
    for path in (tmp_path / "file.safetensors", write_base(tmp_path / "folder", networks)):
        read = load_networks(path)["vae"]
        assert (decode_latents(read, latents).int() - decode_latents(networks["vae"], latents).int()).abs().max() <= 1
        other_mean, other_factor = latent_scale(read)
        found = encode_images(read, image)
        torch.testing.assert_close((found[0] - other_mean) * other_factor, (encoded[0] - mean) * factor)
        spread = (factor.log() * 2, other_factor.log() * 2)
        torch.testing.assert_close(found[1] + spread[1], encoded[1] + spread[0], atol=1e-4, rtol=1e-4)
    config = StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", local_files_only=True).vae.config
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (0.2, MEAN, STD)
