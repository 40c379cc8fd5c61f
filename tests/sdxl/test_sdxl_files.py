"""SDXL's networks and files: names and shapes of the real one, bit-exact round trips, diffusers as another reader."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="make install-sdxl")

from diffusers import StableDiffusionXLPipeline

from sdxl.config import NoiseConfig, SDXLConfig
from sdxl.files.checkpoints import save_single_file
from sdxl.files.family import PARTS, PREFIXES, build_part, draw_networks, list_configs
from sdxl.files.names import from_single_file, part_state, to_single_file
from sdxl.networks import describe_base, load_networks, open_networks
from sdxl.settle import settle_noise
from sdxl.step import build_noise_table
from sdxl.vae import AS_STATED
from tests.small_sdxl import EPSILON, V_ZTSNR, write_base
from tests.support import assert_same_tensors, refuses
from tests.utils.io.test_hub import server  # noqa: F401 (a fixture)
from utils.io.files import read_json, write_json
from utils.io.weights import read_header

GRAINS = {"multires_iterations": 0, "multires_discount": 0.3}
NOISE = {**V_ZTSNR, "convert": False, "offset": 0.0, "perturbation": 0.0, **GRAINS}
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
    return draw_networks()


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("sdxl") / "folder", networks)


@pytest.fixture(scope="module")
def file(networks, folder):
    file = folder.parent / "sdxl.safetensors"
    save_single_file(file, networks, **V_ZTSNR, dtype=torch.float32, facts=FACTS)
    return file


def states(networks):
    """Return the tensors of networks by part and name."""
    whole = {}
    for part in PARTS:
        whole |= {f"{part}.{name}": one for name, one in part_state(part, networks[part]).items()}
    return whole


def test_names_and_shapes_are_those_of_the_real_sdxl():
    """The list was compared with ljleb/sd-mecha:model_configs/sdxl-sgm.yaml, which was read from the published file."""
    lines = []
    for part, config in list_configs(tiny=False).items():
        with torch.device("meta"):
            network = build_part(part, config)
        assert all(getattr(network.config, name) == value for name, value in PUBLISHED[part].items())
        single = to_single_file(part, state := part_state(part, network))
        read = from_single_file(part, single)
        assert {name: one.shape for name, one in read.items()} == {name: one.shape for name, one in state.items()}
        lines += [PREFIXES[part]]
        lines += sorted(f"{name.removeprefix(PREFIXES[part])} {list(one.shape)}" for name, one in single.items())
    golden = Path(__file__).with_name("names.txt").read_text().splitlines()
    assert lines == golden and len(golden) == 2513 + len(PARTS)


def test_our_files_are_read_bit_exactly(networks, folder, file):
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: openrail++\n---\n# SDXL\n")
    for path in (folder, file):
        found = load_networks(path)
        assert_same_tensors(states(found), states(networks))
        assert found["vae"].config.scaling_factor == 0.13025
        assert {"license": "openrail++", **V_ZTSNR}.items() <= describe_base(path).items()
        ids = torch.randint(999, (1, 77))
        assert torch.equal(found["text_encoder"](ids)[0], networks["text_encoder"](ids)[0])


def test_diffusers_reads_both(networks, folder, file):
    first = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    second = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert first.scheduler.config.prediction_type == "v_prediction" and not first.config.force_zeros_for_empty_prompt
    assert first.scheduler.alphas_cumprod[-1] == 0 and first.scheduler.config.timestep_spacing == "trailing"
    for pipeline in (first, second):  # tests/sdxl/test_diffusion_exports.py compares their pictures
        assert_same_tensors(states(pipeline.components), states(networks))
    assert first.tokenizer_2("a cat", padding="max_length").input_ids[-1] == 0


def test_marks_and_metadata_of_a_single_file(networks, file, tmp_path):
    shapes, texts = read_header(file)
    assert shapes["v_pred"].shape == shapes["ztsnr"].shape == (0,)
    wanted = {"modelspec.prediction_type": "v", "modelspec.title": "toy", "modelspec.sai_model_spec": "1.0.1"}
    assert wanted.items() <= texts.items()
    save_single_file(tmp_path / "half.safetensors", networks, dtype=torch.float16, facts=FACTS, **EPSILON)
    shapes, texts = read_header(tmp_path / "half.safetensors")
    assert not {"v_pred", "ztsnr"} & shapes.keys() and texts["modelspec.prediction_type"] == "epsilon"
    dtypes = {part: {one.dtype for name, one in shapes.items() if name.startswith(PREFIXES[part])} for part in PARTS}
    assert dtypes.pop("vae") == {torch.float32} and all(found == {torch.float16} for found in dtypes.values())


FIRST, SECOND, IDS = PREFIXES["text_encoder"], PREFIXES["text_encoder_2"], "text_model.embeddings.position_ids"
ONE, EMPTY, LOW = torch.ones(1), torch.empty(0), torch.float8_e4m3fn
TABLES = {zero: build_noise_table(zero).alpha.square() for zero in (False, True)}
# What programs write beside SDXL's tensors, metadata, and what the file then says: prediction type, zero terminal SNR.
PROGRAMS = {
    "ComfyUI": (
        {FIRST + IDS: torch.arange(77.0)[None], f"{SECOND}transformer.{IDS}": torch.arange(77)[None], "v_pred": EMPTY,
         f"{SECOND}logit_scale": ONE}, {"modelspec.predict_key": "v"}, ("v_prediction", None),
    ),
    "Forge": (
        {f"{FIRST}text_projection.weight": torch.eye(32), f"{FIRST}logit_scale": ONE, "v_pred": EMPTY, "ztsnr": EMPTY,
         "conditioner.embedders.0.logit_scale": ONE, "conditioner.embedders.0.text_projection": torch.eye(32)}, {},
        ("v_prediction", True),
    ),
    "sd-scripts": ({f"{SECOND}logit_scale": ONE}, {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    "OneTrainer": (
        {"betas": TABLES[True], "alphas_cumprod": TABLES[True], "posterior_mean_coef1": ONE, "v_pred": EMPTY}, {},
        ("v_prediction", True),
    ),
    "sgm": (
        {"denoiser.sigmas": (1 / TABLES[False] - 1).sqrt().half(), "model_ema.decay": ONE,
         "first_stage_model.loss.discriminator.main.0.weight": ONE}, {}, ("epsilon", False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_of_other_programs_are_read(program, networks, file, tmp_path):
    beside, metadata, says = PROGRAMS[program]
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in ("v_pred", "ztsnr")}
    tensors |= {name: one.clone() for name, one in beside.items()}
    save_file(tensors, path := tmp_path / "other.safetensors", metadata=metadata)
    assert_same_tensors(states(load_networks(path)), states(networks))
    source = describe_base(path)
    assert (source["prediction_type"], source["zero_terminal_snr"]) == says
    assert source["other_noise"] is None and source["unread"] == []


def test_a_first_encoder_without_prefix_float8_and_foreign_tensors(networks, file, tmp_path):
    """As transformers 5.6 and later name it in diffusers' script; float8 has the values of its bfloat16."""
    tensors = {name.replace(f"{FIRST}text_model.", FIRST): one for name, one in load_file(file).items()}
    low = {name: one.to(LOW) for name, one in tensors.items()}
    save_file({**low, "model_ema.w": ONE}, path := tmp_path / "other.safetensors")
    assert_same_tensors(
        states(load_networks(path)), {name: one.to(LOW).float() for name, one in states(networks).items()}
    )
    assert describe_base(path)["unread"] == ["model_ema.w"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_those_of_the_index(variant, networks, folder, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.save_pretrained(other := tmp_path / "other", max_shard_size="2MB", variant=variant)
    stale = next(other.glob("unet/*-00001-of-*"))
    shutil.copy(stale, stale.with_name("diffusion_pytorch_model-00009-of-00009.safetensors"))
    assert_same_tensors(states(load_networks(other)), states(networks))
    shutil.copy(stale, stale.with_name(f"diffusion_pytorch_model{'.fp16' if variant else ''}.safetensors"))
    with refuses("both"):
        load_networks(other)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"beta_schedule": "linear"}, "beta_schedule 'linear'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas False"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "zero terminal SNR with flow"),
        ({"prediction_type": "sample"}, "sample"),
        ({"prediction_type": "epsilon"}, "zero terminal SNR with epsilon"),
        ({"rescale_betas_zero_snr": "yes"}, "yes"),
        ("EDMEulerScheduler", "EDMEulerScheduler has beta_start None"),
    ],
)
def test_another_noise_schedule_is_never_sdxls(changes, word, folder, tmp_path):
    file = shutil.copytree(folder, tmp_path / "other") / "scheduler/scheduler_config.json"
    new = {"_class_name": changes} if isinstance(changes, str) else {**read_json(file), **changes}
    write_json(file, new)
    assert word in describe_base(tmp_path / "other")["other_noise"]
    with refuses("^task.noise: .*other"):
        settle_noise(str(tmp_path / "other"), NoiseConfig(**NOISE))
    settle_noise(str(tmp_path / "other"), NoiseConfig(**{**NOISE, "convert": True}))


FLOW = {"prediction_type": "flow", "zero_terminal_snr": False}


@pytest.mark.parametrize(
    "stated",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5},
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction",
         "flow_shift": 2.5},
        "modelspec.prediction_type",
    ],
)  # fmt: skip
def test_a_base_model_that_says_flow_is_one(stated, folder, file, tmp_path):
    if isinstance(stated, str):
        tensors = {name: tensor for name, tensor in load_file(file).items() if name not in ("v_pred", "ztsnr")}
        save_file(tensors, path := tmp_path / "x.safetensors", {stated: "flow", "ss_discrete_flow_shift": "2.5"})
    else:
        path = shutil.copytree(folder, tmp_path / "other")
        write_json(path / "scheduler/scheduler_config.json", stated)
    assert (describe_base(path)["other_noise"], describe_base(path)["shift"]) == (None, 2.5)
    settle_noise(str(path), NoiseConfig(**{**NOISE, **FLOW}))
    with refuses("prediction_type=flow task.noise.zero_terminal_snr=false; set that"):
        settle_noise(str(path), NoiseConfig(**NOISE))


def test_what_a_base_model_leaves_open_is_said(file, tmp_path, caplog):
    save_file({**load_file(file), "extra": ONE}, path := tmp_path / "other.safetensors")
    settle_noise(str(path), NoiseConfig(**NOISE))
    assert "belong to no network, such as extra" in caplog.text and "does not say" not in caplog.text
    save_file({name: one for name, one in load_file(file).items() if name != "ztsnr"}, path)
    for zero in (True, False):
        settle_noise(str(path), NoiseConfig(**{**NOISE, "zero_terminal_snr": zero}))
        assert f"as task.noise.zero_terminal_snr={zero}".lower() in caplog.text
    with refuses("^task.noise: .* of task.noise.prediction_type=v_prediction; set that"):
        settle_noise(str(path), NoiseConfig(**{**NOISE, **EPSILON}))


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("model_index.json", "_class_name", "StableDiffusionPipeline"),
        ("model_index.json", "requires_aesthetics_score", "refiner"),
        ("unet/config.json", "attention_head_dim", [4, 4, 4]),
        ("unet/config.json", "resnet_time_scale_shift", "scale_shift"),
        ("vae/config.json", "scaling_factor", "0.1"),
        ("vae/config.json", "latents_mean", [0.1, 0, 0]),
        ("text_encoder/config.json", "layer_norm_eps", 1e-6),
    ],
)
def test_folders_are_refused(file, name, value, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other") / file
    write_json(other, {**read_json(other), name: value})
    with refuses(rf"^model.path: .*{name if '/' in file else value}"), torch.device("meta"):
        load_networks(tmp_path / "other")


def test_the_frozen_vae_is_in_float32(folder):
    for path in (str(folder), None):
        config = SDXLConfig.model_construct(
            name="x", path=path, vae=None, vae_values=AS_STATED, frozen_dtype="bfloat16"
        )
        found = open_networks(config, ("vae", "text_encoder"), frozen=True)
        assert (found["vae"].dtype, found["text_encoder"].dtype) == (torch.float32, torch.bfloat16)


def test_single_files_are_refused(file, tmp_path):
    tensors = load_file(file)
    short = {name: one for name, one in tensors.items() if not name.startswith(f"{PREFIXES['unet']}middle_block.2")}
    named = {"Stable Diffusion 1": {"cond_stage_model.transformer.x": ONE}, "mid_block.resnets.1.*missing": short}
    first = f"{PREFIXES['unet']}input_blocks.0.0.weight"
    named["inpaints"] = {**tensors, first: torch.zeros(16, 9, 3, 3)}
    for said, mark in (("quantised", "scaled_fp8"), ("scales", f"{first}.absmax"), ("FLUX", "double_blocks.0.x")):
        named[said] = {**tensors, mark: ONE}
    for said, other in named.items():
        save_file(other, tmp_path / "other.safetensors")
        with refuses(f"(?s)^model.path: .*{said}"):
            load_networks(tmp_path / "other.safetensors")
    torch.save({}, path := tmp_path / "model.ckpt")
    with refuses("^model.path: .*model.ckpt is no .safetensors file"):
        describe_base(path)


def test_a_base_on_the_hub_is_fetched_and_is_the_folder(tmp_path, server):  # noqa: F811
    """Without what is not read, such as other variants. Offline, the file to fetch is named."""
    write_base(tmp_path / "base", noise=EPSILON)
    files = [path for path in (tmp_path / "base").rglob("*") if path.is_file()]
    content = {path.relative_to(tmp_path / "base").as_posix(): path.read_bytes() for path in files}
    server.files = {**content, "unet/diffusion_pytorch_model.fp16.safetensors": b"other"}
    server.files["README.md"] = b"---\nlicense: mit\n---\n"
    assert_same_tensors(load_networks("hf:me/net@main")["unet"].state_dict(), draw_networks()["unet"].state_dict())
    assert describe_base("hf:me/net@main")["license"] == "mit" and not list(tmp_path.glob("hub/**/*fp16*"))
    server.files = {}
    with refuses(r"^model\.path: hf:me/net@v2 has no model_index\.json"):
        describe_base("hf:me/net@v2")
