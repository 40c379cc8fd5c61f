"""init_from of task=diffusion: a LoRA of ours, of kohya's and of diffusers', and a U-Net go on where they ended."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="make install-sdxl")

from sdxl.files.family import draw_networks
from sdxl.lora.files import read_lora
from tests.in_process import run
from tests.support import TINY, make_collection, refuses
from utils.io.files import write_json
from utils.io.weights import read_weights

SHORT = [
    *TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.batch_size=4",
    "optim.lr=0.03", "data.root=images",
]  # fmt: skip
LORA = ["task.lora.alpha=8.0", "task.lora.rank=4", "task.lora.targets=['unet.*attn?.to_*','text_encoder*_proj']"]


@pytest.fixture(scope="module")
def place(folder):
    """A folder with a run of a LoRA, its exports, and a run of the U-Net."""
    make_collection(folder / "images", per_class=4, validation=1)
    run("finetune_sdxl", [*SHORT, *LORA, "loop.total_steps=2", "run_dir=lora"], folder)
    run("finetune_sdxl", [*SHORT, "task.lora=null", "loop.total_steps=2", "run_dir=unet"], folder)
    for name, form in (("lora", "kohya"), ("unet", "single_file")):
        run("export", [f"run_dir={name}", "weights=last", f"format={form}", "license=cc-by-nc-4.0"], folder)
    save_file(last(folder / "lora"), folder / "pytorch_lora_weights.safetensors", {"modelspec.license": "cc-by-nc-4.0"})
    return folder


def last(run_dir):
    return load_file(run_dir / "weights/last_weights.safetensors")


FILES = {
    "ours": "lora",
    "kohya": "lora/export/kohya/lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "unet": "unet",
    "single_file": "unet/export/single_file/model.safetensors",
}


@pytest.mark.parametrize("source", FILES)
def test_a_run_of_no_steps_has_the_weights_of_its_source(source, place, tmp_path):
    own, name = (["task.lora=null"], "unet") if source in ("unet", "single_file") else ([], "lora")
    words = [*SHORT, *own, f"init_from={FILES[source]}", f"run_dir={tmp_path}/run", "loop.total_steps=0"]
    words += [] if own else ["task.lora.rank_dropout=0.1"]  # not of the file
    run("finetune_sdxl", words, place)
    found, wanted = last(tmp_path / "run"), last(place / name)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert all(tensor.abs().max() > 0 for tensor in found.values())
    origin = read_weights(tmp_path / "run/weights/last_weights.safetensors")[1]["origin"]
    assert origin["license"] == (None if FILES[source] == source or source == "ours" else "cc-by-nc-4.0")


def test_a_resumed_run_needs_the_file_of_its_lora_no_more(place, tmp_path):
    words = [*SHORT, f"init_from={tmp_path}/its.safetensors", f"run_dir={tmp_path}/run", "loop.total_steps=1"]
    (tmp_path / "its.safetensors").write_bytes((place / FILES["kohya"]).read_bytes())
    run("finetune_sdxl", words, place)
    (tmp_path / "its.safetensors").unlink()
    run("finetune_sdxl", words, place)


@pytest.mark.parametrize(
    "words, said",
    [
        (["task.lora.rank=16", f"init_from={FILES['kohya']}"], "^task.lora.rank: "),
        (["init_from=unet"], r"^init_from: .*unet.*is no LoRA"),
        (["task.lora=null", "init_from=lora"], "(?s)^init_from: .*a LoRA needs task.lora"),
        (
            ["task.lora=null", "task.train_text_encoders=true", "init_from=unet"],
            "(?s)^init_from: .*train_text_encoders",
        ),
        ([*LORA, "init_from=lora", "task.noise.zero_terminal_snr=false"], r"^task\.noise\.zero_terminal_snr: False"),
        ([*LORA, "init_from=nothing"], "^init_from: nothing does not exist"),
        ([*LORA, "init_from=lora", "init_weights=ema"], "^init_from: .*has no ema weights"),
    ],
)
def test_what_does_not_continue_is_refused_before_images_are_encoded(words, said, place, tmp_path):
    for more in ([], ["dry_run=true"]):
        own = [f"task.latent_cache={tmp_path}/latents", f"run_dir={tmp_path}/run", "loop.total_steps=1"]
        with refuses(said):
            run("finetune_sdxl", [*SHORT, *words, *own, *more], place)
        assert not (tmp_path / "latents").exists()


def write_lora(path, changes, metadata=None):
    """Write a file of kohya's layout; changes: other tensors."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 32), f"{stem}.lora_up.weight": torch.ones(32, 2)}
    tensors |= {f"{stem}.alpha": torch.tensor(4.0)} | {name.format(stem): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata or {})
    return path


@pytest.mark.parametrize(
    "changes, metadata, said",
    [
        ({"{}.lora_down.weight": torch.ones(2, 20)}, {"ss_base_model_version": "sd_v1"}, r"sd_v1.*\(32, 32\)"),
        ({"{}.w_norm": torch.ones(2)}, {}, "w_norm"),
        ({"{}.dora_scale": torch.ones(31, 1)}, {}, r"dora_scale \(31, 1\)"),
        ({"{}.lora_mid.weight": torch.ones(2, 2)}, {}, "lora_mid"),
        ({"{}.lora_up.weight": None}, {}, "not a readable LoRA"),
        ({"{}.alpha": torch.ones(3)}, {}, "not a readable LoRA"),
        ({"{}.alpha": None}, {"lora_adapter_metadata": '{"unet.lora_alpha": [4]}'}, "not a readable LoRA"),
    ],
)
def test_files_of_another_base_or_kind_are_refused(changes, metadata, said, tmp_path):
    with refuses(said):
        read_lora(write_lora(tmp_path / "other.safetensors", changes, metadata), draw_networks())


def test_the_scale_of_each_layout_and_layers_that_sdxl_does_not_use(tmp_path):
    """sd-scripts also trains the first encoder's last layer; diffusers' newer files have alpha in the header."""
    name, networks = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", draw_networks()
    unused = {"lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_up.weight": torch.ones(64, 2)}
    assert read_lora(write_lora(tmp_path / "kohya.safetensors", unused), networks)[name].scale == 2.0
    assert read_lora(write_lora(tmp_path / "plain.safetensors", {"{}.alpha": None}), networks)[name].scale == 1.0
    other = {f"{name}.lora.down.weight": torch.ones(2, 32), f"{name}.lora.up.weight": torch.ones(32, 2)}
    for number, (texts, scale) in enumerate([({}, 1.0), ({"unet.r": 2, "unet.lora_alpha": 6}, 3.0)]):
        save_file(other, path := tmp_path / f"{number}.safetensors", {"lora_adapter_metadata": json.dumps(texts)})
        assert read_lora(path, networks)[name].scale == scale
    save_file(other | {f"{name}.lora_magnitude_vector": torch.ones(32)}, path)  # PEFT's
    assert read_lora(path, networks)[name].kind == "dora_out"


# A layer as programs name it: (the U-Net's, the second encoder's), and the endings of its matrices.
UNET, TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "text_model.encoder.layers.1.mlp.fc1"
ORIGINAL = "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
KOHYA = (".lora_down.weight", ".lora_up.weight")
SPELLINGS = [
    ((f"lora_unet_{ORIGINAL.replace('.', '_')}", f"lora_te2_{TEXT.replace('.', '_')}"), KOHYA),
    ((f"lora_unet_{UNET.replace('.', '_')}", f"lora_te2_{TEXT.replace('.', '_')}"), KOHYA),
    ((f"unet.{ORIGINAL}", f"clip_g.{TEXT}"), KOHYA),
    ((f"diffusion_model.{ORIGINAL}", f"text_encoders.clip_g.transformer.{TEXT}"), KOHYA),
    ((f"lycoris_{UNET.replace('.', '_')}",), KOHYA),
    ((f"base_model.model.{UNET}",), (".lora_A.weight", ".lora_B.weight")),
    ((f"unet.{UNET}", f"text_encoder_2.{TEXT}"), (".lora_A.default.weight", ".lora_B.default.weight")),
    ((f"unet.{UNET}", f"text_encoder_2.{TEXT}"), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    ((f"unet.{UNET[:-8]}processor.to_out",), ("_lora.down.weight", "_lora.up.weight")),
]  # fmt: skip


@pytest.mark.parametrize("stems, endings", SPELLINGS)
def test_layers_are_found_in_each_spelling_and_what_is_foreign_is_named(stems, endings, tmp_path, log):
    sides = {"unet": (32, 32), "text_encoder_2": (48, 96)}
    wanted, tensors = {}, {"bundle_emb.sks.clip_g": torch.ones(1, 48)}
    for stem, (network, (inner, outer)), inside in zip(stems, sides.items(), (UNET, TEXT)):
        down, up = torch.rand(2, inner), torch.rand(outer, 2)
        tensors |= {f"{stem}{endings[0]}": down, f"{stem}{endings[1]}": up, f"{stem}.alpha": torch.tensor(4.0)}
        wanted[f"{network}.{inside}"] = 2 * up @ down
    tensors[f"lora_unet_down_blocks_9_conv{KOHYA[0]}"] = torch.ones(2, 2)
    save_file(tensors, path := tmp_path / "lora.safetensors")
    found = read_lora(path, draw_networks())
    assert found.keys() == wanted.keys()
    for name, change in found.items():
        torch.testing.assert_close(change.matrix(), wanted[name])
    assert "bundle_emb.sks.clip_g" in log.text and "lora_unet_down_blocks_9_conv" in log.text


def test_a_layer_has_its_own_alpha_in_pefts_configuration(tmp_path):
    values = {"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 8}, "use_rslora": True}
    matrices = {}
    for stem in (f"base_model.model.{UNET[:-8]}{layer}" for layer in ("to_q", "to_k")):
        matrices |= {f"{stem}.lora_A.weight": torch.ones(4, 32), f"{stem}.lora_B.weight": torch.ones(32, 4)}
    save_file(matrices, path := tmp_path / "adapter_model.safetensors")
    for is_rs in (False, True):
        write_json(tmp_path / "adapter_config.json", values | {"use_rslora": is_rs})
        scales = {name.rsplit(".")[-1]: change.scale for name, change in read_lora(path, draw_networks()).items()}
        assert scales == ({"to_q": 4.0, "to_k": 3.0} if is_rs else {"to_q": 2.0, "to_k": 1.5})
