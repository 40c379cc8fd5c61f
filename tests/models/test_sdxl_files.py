"""SDXL's networks and files: names and shapes of the real one, bit-exact round trips, diffusers as another reader."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from diffusers import StableDiffusionXLPipeline

from models.sdxl.checkpoint_files import write_diffusers, write_single_file
from models.sdxl.names import PARTS, PREFIXES, part_state, to_single_file
from models.sdxl.networks import (
    build_part,
    list_configs,
    load_networks,
    tiny_networks,
)
from models.sdxl.tokenizer import build_tokenizer
from utils.errors import UserError
from utils.io.weights import read_header

V_ZTSNR = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
FACTS = {"title": "toy", "license": "openrail++"}
# What config.json of each network of stabilityai/stable-diffusion-xl-base-1.0 says, and no shape shows.
PUBLISHED = {
    "unet": {"act_fn": "silu", "attention_head_dim": [5, 10, 20], "norm_num_groups": 32, "sample_size": 128,
             "use_linear_projection": True, "addition_time_embed_dim": 256},
    "vae": {"force_upcast": True, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": {"hidden_act": "quick_gelu", "num_attention_heads": 12},
    "text_encoder_2": {"hidden_act": "gelu", "num_attention_heads": 20},
}  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    return tiny_networks()


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "folder"
    write_diffusers(folder, networks, build_tokenizer(), **V_ZTSNR, dtype=torch.float32, zeros_for_empty_prompt=False)
    return folder


@pytest.fixture(scope="module")
def file(networks, folder):
    file = folder.parent / "sdxl.safetensors"
    write_single_file(file, networks, **V_ZTSNR, dtype=torch.float32, metadata=FACTS)
    return file


def assert_equal_states(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def states(pipeline):
    return {part: part_state(part, getattr(pipeline, part)) for part in PARTS}


def test_names_and_shapes_are_those_of_the_real_sdxl():
    """The list was compared with ljleb/sd-mecha:model_configs/sdxl-sgm.yaml, which was read from the published file."""
    lines = []
    for part, config in list_configs(tiny=False).items():
        with torch.device("meta"):
            network = build_part(part, config)
        assert all(getattr(network.config, name) == value for name, value in PUBLISHED[part].items())
        single = to_single_file(part, part_state(part, network))
        lines += [PREFIXES[part]]
        lines += sorted(f"{name.removeprefix(PREFIXES[part])} {list(one.shape)}" for name, one in single.items())
    golden = Path(__file__).with_name("sdxl_names.txt").read_text().splitlines()
    assert lines == golden and len(golden) == 2513 + len(PARTS)


def test_our_files_are_read_bit_exactly(networks, folder, file):
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: openrail++\n---\n# SDXL\n")
    for path in (folder, file):
        found = load_networks(path)
        for part, state in networks.states().items():
            assert_equal_states(found.states()[part], state)
        assert found.source["licence"] == "openrail++" and found.source["vae_scaling_factor"] == 0.13025
        assert {name: found.source[name] for name in V_ZTSNR} == V_ZTSNR
        ids = torch.randint(999, (1, 77))
        assert torch.equal(found.text_encoder(ids)[0], networks.text_encoder(ids)[0])


def test_diffusers_reads_both(networks, folder, file):
    first = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    second = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert first.scheduler.config.prediction_type == "v_prediction" and not first.config.force_zeros_for_empty_prompt
    assert first.scheduler.alphas_cumprod[-1] == 0 and first.scheduler.config.timestep_spacing == "trailing"
    pictures = []
    for pipeline in (first, second):
        for part, state in networks.states().items():
            assert_equal_states(states(pipeline)[part], state)
        pipeline.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        made = pipeline("a cat", height=64, width=64, num_inference_steps=2, generator=draw, output_type="pt")
        pictures.append(made.images)
    assert pictures[0].isfinite().all() and torch.allclose(*pictures, atol=1e-4)
    assert first.tokenizer_2("a cat", padding="max_length").input_ids[-1] == 0


def test_marks_metadata_and_hash_of_a_single_file(networks, file, tmp_path):
    shapes, texts = read_header(file)
    assert shapes["v_pred"].shape == shapes["ztsnr"].shape == (0,)
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    wanted = {"hash_sha256": f"0x{digest}", "prediction_type": "v", "title": "toy", "sai_model_spec": "1.0.1"}
    assert wanted.items() <= {name.removeprefix("modelspec."): text for name, text in texts.items()}.items()
    settings = {"prediction_type": "epsilon", "zero_terminal_snr": False, "dtype": torch.float16, "metadata": FACTS}
    write_single_file(tmp_path / "half.safetensors", networks, **settings)
    shapes, texts = read_header(tmp_path / "half.safetensors")
    assert not {"v_pred", "ztsnr"} & shapes.keys() and texts["modelspec.prediction_type"] == "epsilon"
    dtypes = {part: {one.dtype for name, one in shapes.items() if name.startswith(PREFIXES[part])} for part in PARTS}
    assert dtypes.pop("vae") == {torch.float32} and all(found == {torch.float16} for found in dtypes.values())


def test_files_of_other_programs_are_read(networks, folder, file, tmp_path):
    """Tensors without weights; a prediction type that metadata alone state; what diffusers saves, in shards."""
    tensors = load_file(file)
    del tensors["v_pred"], tensors["ztsnr"]
    tensors[f"{PREFIXES['text_encoder']}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors[f"{PREFIXES['text_encoder_2']}logit_scale"] = torch.tensor(4.6)
    save_file(tensors, tmp_path / "other.safetensors", metadata={"modelspec.prediction_type": "v"})
    found = load_networks(tmp_path / "other.safetensors", only=("text_encoder",)).source
    assert found["prediction_type"] == "v_prediction" and found["zero_terminal_snr"] is False
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.save_pretrained(other := tmp_path / "other", max_shard_size="2MB")
    assert len(list(other.glob("unet/*.safetensors"))) > 1
    (other / "vae/diffusion_pytorch_model.safetensors").rename(other / "vae/diffusion_pytorch_model.fp16.safetensors")
    for part, state in load_networks(other).states().items():
        assert_equal_states(state, networks.states()[part])


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
        ("unet/config.json", "attention_head_dim", [4, 4, 4]),
    ],
)
def test_folders_are_refused(file, name, value, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other") / file
    other.write_text(json.dumps({**json.loads(other.read_text()), name: value}))
    with pytest.raises(UserError, match=rf"^model.path: .*{name if '/' in file else value}"), torch.device("meta"):
        load_networks(tmp_path / "other")


UNET = PREFIXES["unet"]
FILES = {
    "Stable Diffusion 1": lambda tensors: {"cond_stage_model.transformer.x": torch.zeros(1)},
    "mid_block.resnets.1.*missing": lambda tensors: {
        name: one for name, one in tensors.items() if not name.startswith(f"{UNET}middle_block.2")
    },
}


@pytest.mark.parametrize("named", FILES)
def test_single_files_are_refused(named, file, tmp_path):
    save_file(FILES[named](load_file(file)), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"(?s)^model.path: .*{named}"):
        load_networks(tmp_path / "other.safetensors")
