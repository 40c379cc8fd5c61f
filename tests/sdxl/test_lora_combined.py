"""LoRAs of several LoRAs and of two checkpoints: export.py with lora or rank."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="make install-sdxl")

from tests.in_process import run
from tests.small_sdxl import write_base
from tests.support import refuses
from utils.io.files import read_json

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def combine(place, *words):
    run("export", ["format=kohya", "precision=fp32", "output=out", *words], place)
    tensors = load_file(place / "out/lora.safetensors")
    (error,) = read_json(place / "out/errors.json").values()
    return tensors[f"{LAYER}.lora_up.weight"] @ tensors[f"{LAYER}.lora_down.weight"], error


def test_a_merged_lora_is_the_sum_and_a_smaller_one_the_nearest(tmp_path):
    ups, downs = torch.rand(2, 640, 3), torch.rand(2, 3, 640)
    for name, up, down in zip("ab", ups, downs):
        save_file({f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}, tmp_path / f"{name}.safetensors")
    first, second = ups @ downs
    found = combine(tmp_path, "weights=a.safetensors", "lora=[b.safetensors:0.5]")[0]
    torch.testing.assert_close(found, first + 0.5 * second, rtol=1e-4, atol=1e-4)
    lost = torch.linalg.svdvals(first)[1:].norm() / first.norm()
    assert combine(tmp_path, "weights=a.safetensors", "rank=1")[1] == pytest.approx(lost.item(), rel=1e-3)


@pytest.mark.parametrize("word", ["format=onnx", "card=x", "license=mit", "dry_run=true"])
def test_what_a_combined_lora_has_not_is_refused(word, tmp_path):
    with refuses(f"^{word.partition('=')[0]}: "):
        combine(tmp_path, "weights=a.safetensors", "rank=1", word)


def test_the_lora_of_two_checkpoints_is_their_difference(tmp_path):
    """Also of a layer of which two numbers alone differ."""
    shutil.copytree(write_base(tmp_path / "base"), tmp_path / "tuned")
    file = tmp_path / "tuned/unet/diffusion_pytorch_model.safetensors"
    tensors, change = load_file(file), torch.zeros(32, 32)
    change[3, 5], change[7, 1] = 1.0, 2.0
    tensors["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"] += change
    save_file(tensors, file)
    torch.testing.assert_close(combine(tmp_path, "weights=tuned", "model.path=base", "rank=2")[0], change)
