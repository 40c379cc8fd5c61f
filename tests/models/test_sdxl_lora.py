"""LoRA of SDXL's networks: training, merging, and both file layouts, which diffusers reads as its own."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers")

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from models.sdxl.family import draw_networks
from models.sdxl.lora import LoRA, LoRAConfig, write_diffusers, write_kohya
from utils.errors import UserError

ATTENTION = ["unet.*.attn?.to_*"]
ALL = {"targets": ["*"], "conv": True, "text_encoders": True}
FACTS = {"title": "toy", "prediction_type": "v_prediction"}


def build_networks():
    """Return the networks of a tiny SDXL, without gradients."""
    parts = {part: network for part, network in draw_networks().items() if part != "vae"}
    return {name: network.requires_grad_(False) for name, network in parts.items()}


def run_unet(networks, prompt=None, pooled=None):
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    prompt = torch.randn(2, 77, 80, generator=draw) if prompt is None else prompt
    pooled = torch.randn(2, 48, generator=draw) if pooled is None else pooled
    conditions = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    return networks["unet"](latents, torch.tensor([10, 900]), prompt, added_cond_kwargs=conditions).sample


def run(networks):
    """Return the U-Net's output for what the text encoders make of two captions."""
    ids = torch.randint(999, (2, 77), generator=torch.Generator().manual_seed(2))
    first = networks["text_encoder"](ids, output_hidden_states=True)
    second = networks["text_encoder_2"](ids, output_hidden_states=True)
    prompt = torch.cat([first.hidden_states[-1], second.hidden_states[-1]], dim=-1)
    return run_unet(networks, prompt, second.text_embeds)


def build_lora(networks, **changes):
    values = {"rank": 4, "alpha": 2.0, "targets": ATTENTION, "conv": False, "text_encoders": False}
    return LoRA(networks, LoRAConfig(**(values | changes)))


def vary(lora):
    """Give a LoRA updates that change the outputs."""
    draw = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return lora


def gradients(networks, lora):
    lora.zero_grad()
    run_unet(networks).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}


def test_begins_without_effect_and_trains_the_matrices_alone():
    networks = build_networks()
    before, names = run_unet(networks), set(networks["unet"].state_dict())
    lora = build_lora(networks)
    lora.attach(networks)
    assert torch.equal(run_unet(networks), before) and set(networks["unet"].state_dict()) == names
    found = gradients(networks, vary(lora))
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert all(parameter.grad is None for parameter in networks["unet"].parameters())
    assert {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"} <= set(lora.state_dict())
    networks["unet"].enable_gradient_checkpointing()
    networks["unet"].train()  # some releases of diffusers recompute in this mode only
    for name, gradient in gradients(networks, lora).items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_merged_networks_give_the_same_outputs():
    networks = build_networks()
    lora, plain = vary(build_lora(networks, **ALL)), run(networks)
    lora.attach(networks)
    wanted = run(networks)
    assert (wanted - plain).abs().max() > 0.1
    lora.merge(networks)
    torch.testing.assert_close(run(networks), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"targets": ["unet.*.to_q", "unet.*.atn1.to_q"]}, "task.lora.targets.1: .*attn1.to_q"),
        ({"targets": ["unet.*.conv1"]}, "task.lora.targets.0: .*task.lora.conv=true"),
        ({"text_encoders": True}, "task.lora.text_encoders: true"),
    ],
)
def test_targets_that_match_nothing_are_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        build_lora(build_networks(), **changes)


def test_a_rank_above_a_layers_full_rank_is_said(caplog):
    build_lora(build_networks(), rank=16, targets=["unet.conv_*"], conv=True).warn_of_rank()
    assert "16 is above the full rank of 1 of 2 layers" in caplog.text and "unet.conv_out: 4" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_reads_every_layer(layout, tmp_path):
    networks = build_networks()
    lora = vary(build_lora(networks, **ALL))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    (write_kohya if layout == "kohya" else write_diffusers)(path, lora, torch.float32, FACTS)
    theirs = StableDiffusionXLPipeline(
        vae=None, tokenizer=None, tokenizer_2=None, scheduler=EulerDiscreteScheduler(), **build_networks()
    )
    theirs.load_lora_weights(path)
    modules = [module for name in networks for module in getattr(theirs, name).modules()]
    assert sum(hasattr(module, "lora_A") for module in modules) == len(lora.names)
    lora.attach(networks)
    found = run({name: getattr(theirs, name) for name in networks})
    torch.testing.assert_close(found, run(networks), rtol=1e-4, atol=1e-4)


def test_metadata_and_dtype(tmp_path):
    lora = build_lora(build_networks())
    write_kohya(tmp_path / "lora.safetensors", lora, torch.float16, FACTS)
    content = (tmp_path / "lora.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:length])["__metadata__"]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content[length:]).hexdigest()}"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert (metadata["modelspec.title"], metadata["modelspec.prediction_type"]) == ("toy", "v")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
        assert file.get_tensor(f"{stem}.lora_down.weight").dtype == torch.float16
        assert file.get_tensor(f"{stem}.alpha").item() == 2.0
