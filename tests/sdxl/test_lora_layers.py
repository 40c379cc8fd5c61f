"""LoRA of SDXL's networks: training, merging, and its file. That diffusers reads it: test_diffusion_exports.py."""

import copy

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="make install-sdxl")

from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from sdxl.files.family import draw_networks
from sdxl.lora.changes import LayerChange
from sdxl.lora.config import LoRAConfig
from sdxl.lora.files import adapter_state, describe_lora, read_lora
from sdxl.lora.lora import LoRA, LoRALayer, add_changes, save_lora
from tests.support import refuses

ALL = ["unet.*", "text_encoder*"]
KINDS = ["lora", "dora", "dora_out", "loha", "lokr"]
NAMES = {"lora": ["lora_A.weight", "lora_B.weight"], "dora": ["lora_A.weight", "lora_B.weight", "dora_scale"]}
NAMES |= {
    "dora_out": NAMES["dora"],
    "loha": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "lokr": ["lokr_w1", "lokr_w2"],
}
FACTS = {"title": "toy", "prediction_type": "v_prediction"}


def build_networks():
    parts = {part: network for part, network in draw_networks().items() if part != "vae"}
    return {name: network.requires_grad_(False) for name, network in parts.items()}


def run(networks):
    """Return the U-Net's output for what the text encoders make of two captions."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(999, (2, 77), generator=draw)
    first, second = (networks[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2"))
    prompt = torch.cat([first.hidden_states[-1], second.hidden_states[-1]], dim=-1)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    conditions = {"text_embeds": second.text_embeds, "time_ids": torch.full((2, 6), 64.0)}
    return networks["unet"](latents, torch.tensor([10, 900]), prompt, added_cond_kwargs=conditions).sample


def configure(**changes):
    values = {"kind": "lora", "rank": 4, "alpha": 2.0, "factor": -1, "targets": ["unet.*.attn?.to_*"], "layers": {}}
    values |= {f"{name}_dropout": 0.0 for name in ("network", "rank", "module")} | {"scale_weight_norms": None}
    return LoRAConfig(**values | changes)


def build_lora(networks, **changes):
    return LoRA(networks, configure(**changes))


def vary(lora):
    """Give a LoRA updates that change the outputs."""
    draw = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return lora


def gradients(networks, lora):
    lora.zero_grad()
    run(networks).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_begins_without_effect_and_trains_the_matrices_alone(kind):
    networks = build_networks()
    before, names = run(networks), set(networks["unet"].state_dict())
    lora = build_lora(networks, kind=kind)
    lora.attach(networks)
    torch.testing.assert_close(run(networks), before, rtol=0, atol=1e-5 if "dora" in kind else 0)
    assert set(networks["unet"].state_dict()) == names
    found = gradients(networks, vary(lora))
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert all(parameter.grad is None for parameter in networks["unet"].parameters())
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert {name.removeprefix(f"{layer}.") for name in lora.state_dict() if layer in name} == set(NAMES[kind])
    networks["unet"].enable_gradient_checkpointing()
    networks["unet"].train()  # some releases of diffusers recompute in this mode only
    torch.testing.assert_close(gradients(networks, lora), found, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_merged_networks_and_those_of_the_file_give_the_same_outputs(kind, tmp_path):
    """LyCORIS' files of the other kinds, with alpha as ComfyUI reads it."""
    networks = build_networks()
    lora, plain = vary(build_lora(networks, kind=kind, targets=ALL)), run(networks)
    lora.attach(networks)
    wanted = run(networks)
    assert (wanted - plain).abs().max() > 0.1
    save_lora(tmp_path / "lora.safetensors", lora.changes(), torch.float32, FACTS)
    save_lora(tmp_path / "half.safetensors", lora.changes(), torch.float16, FACTS)
    tensors = load_file(tmp_path / "half.safetensors")
    assert all(one.dtype == (torch.float32 if ".alpha" in name else torch.float16) for name, one in tensors.items())
    others = build_networks()
    add_changes(others, read_lora(tmp_path / "lora.safetensors", others))
    lora.merge(networks)
    for merged in (networks, others):
        torch.testing.assert_close(run(merged), wanted, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("which", ["network", "rank", "module"])
@pytest.mark.parametrize("layer, shape", [(nn.Linear(4, 4), (99, 5, 4)), (nn.Conv2d(4, 4, 1), (99, 4, 5, 1))])
def test_dropouts_drop_what_they_name_but_not_in_evaluation(which, layer, shape):
    """Of matrices that change nothing, so that an output is a rank. Modules are dropped as a whole, and not scaled."""
    lora = LoRA({"unet": nn.ModuleList([layer])}, configure(targets=["unet.0"], alpha=4.0, **{f"{which}_dropout": 0.5}))
    for matrix in lora.parameters():
        matrix.copy_(torch.eye(4).view(matrix.shape))
    inputs = lora.get_submodule("unet.0"), layer, (torch.ones(shape),), torch.zeros(shape)
    torch.manual_seed(0)
    found = [lora._add(*inputs) for _ in range(9)]
    shared = {"network": [], "rank": [shape.index(5)], "module": [0, 1, 2]}[which]
    assert [axis for axis in range(3) if found[0].std(dim=axis).max() == 0] == shared
    assert torch.stack(found).unique().tolist() == [0.0, 1.0 if which == "module" else 2.0]
    assert lora.eval()._add(*inputs).eq(1).all()


@torch.no_grad()
def test_norms_above_the_limit_are_scaled_down_to_it():
    lora = vary(build_lora(build_networks()))
    before = {name: change.matrix() for name, change in lora.changes().items()}
    lora.limit_norms(most := before[lora.names[0]].norm() - 1)
    for name, change in lora.changes().items():
        torch.testing.assert_close(change.matrix(), before[name] * (most / before[name].norm()).clamp(max=1))


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(12, 18), nn.Conv2d(12, 18, 3, padding=1)])
@pytest.mark.parametrize("kind, rank", [("lora", 3), ("dora_out", 3), ("loha", 3), ("lokr", 2), ("lokr", 9)])
def test_a_layer_changes_as_that_of_peft(kind, rank, layer):
    tensors = dict(vary(LoRALayer(layer, configure(kind=kind, rank=rank))).named_parameters())
    settings = {"dora_out": {"use_dora": True}, "lora": {}}.get(kind, {"alpha": 2.0})
    settings |= {"lora_alpha": 2.0} if "use_dora" in settings or kind == "lora" else {}
    made = {"loha": LoHaConfig, "lokr": LoKrConfig}.get(kind, LoraConfig)(r=rank, target_modules=["0"], **settings)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), made).base_model.model[0]
    for name, parameter in theirs.named_parameters():
        own = next((own for own in tensors if own.split(".")[0] in name), "dora_scale" if "magnitude" in name else None)
        if own is not None:
            parameter.copy_(tensors[own].view(parameter.shape))
    factor = 2.0 / rank if rank == 9 else 1.0  # PEFT scales whole matrices, too; ComfyUI and LyCORIS do not
    wanted = layer.weight + factor * LayerChange(tensors, 2.0).on(layer.weight)
    inputs = torch.randn(2, 12, *[5] * (layer.weight.ndim - 2))
    operation = torch.nn.functional.linear if layer.weight.ndim == 2 else layer._conv_forward
    torch.testing.assert_close(operation(inputs, wanted, layer.bias), theirs(inputs), rtol=1e-4, atol=1e-5)


def test_the_magnitude_of_a_file_is_as_comfyui_reads_it():
    """comfyanonymous/ComfyUI:comfy/weight_adapter/base.py, weight_decompose, for a magnitude of each input."""
    layer = nn.Conv2d(6, 8, 3)
    update = vary(LoRALayer(layer, configure(kind="dora", rank=2))).change()
    whole = layer.weight + update.matrix().view(layer.weight.shape)
    norm = whole.transpose(0, 1).reshape(6, -1).norm(dim=1).view(1, 6, 1, 1)
    torch.testing.assert_close(layer.weight + update.on(layer.weight), whole * update.tensors["dora_scale"] / norm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_continued_as_it_is_and_written_as_it_was(kind, tmp_path):
    networks, conv = build_networks(), "unet.down_blocks.0.resnets.1.conv1"
    own = {conv: {"kind": kind, "rank": 1, "alpha": 5.0, "factor": -1}}
    theirs = vary(build_lora(networks, kind=kind, targets=[conv, "text_encoder.*mlp.fc1"], layers=own))
    file, other = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_lora(file, theirs.changes(), torch.float32, FACTS)
    lora = LoRA(networks, configure(**describe_lora(file, networks)))
    lora.load_state_dict(adapter_state(file, networks))
    save_lora(other, lora.changes(), torch.float32, FACTS)
    torch.testing.assert_close(load_file(other), load_file(file))


def test_targets_that_match_nothing_are_refused():
    with refuses(r"task.lora.targets.1: .*atn1.to_q' matches no layer"):
        build_lora(build_networks(), targets=["unet.*.to_q", "unet.*.atn1.to_q"])
