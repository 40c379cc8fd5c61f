"""The exports of a run of task=diffusion: diffusers loads each and makes the pictures of the run."""

import hashlib
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="make install-sdxl")

from diffusers import StableDiffusionXLPipeline
from PIL import Image

from engine.exports.opened_task import open_task
from tests.in_process import run, working_in
from tests.small_sdxl import paint, write_base
from tests.support import TINY, front_matter, make_collection, refuses
from utils.io.files import read_json, write_json
from utils.io.weights import read_header, read_weights, write_tensors

PROMPTS = ["tag 1, tag 2", "black"]
SHORT = [
    *TINY["diffusion"], "runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.total_steps=2",
    "loop.batch_size=4", "optim.lr=0.03", "model.path=base", "data.root=images",
    f"task.samples.prompts=[{','.join(repr(prompt) for prompt in PROMPTS)}]",
]  # fmt: skip
LORA = ["task.lora.targets=['unet.*','text_encoder*']", "task.lora.alpha=8.0"]


@pytest.fixture(scope="module")
def place(folder):
    """A folder with a base model, a LoRA of all layers, and a whole U-Net for a VAE with values of its own."""
    make_collection(folder / "images", per_class=4, validation=1)
    write_base(folder / "base")
    (folder / "base/README.md").write_text("---\nlicense: openrail++\n---\n")
    config = shutil.copytree(folder / "base/vae", folder / "vae") / "config.json"
    write_json(config, {**read_json(config), "scaling_factor": 0.2, "shift_factor": 0.1})
    run("finetune_sdxl", [*SHORT, *LORA, "run_dir=lora"], folder)
    run("finetune_sdxl", [*SHORT, "task.lora=null", "run_dir=whole", "model.vae=vae"], folder)
    return folder


@pytest.fixture(scope="module")
def wanted(place):
    """The pictures of each run's task, as its weight file rebuilds it."""
    with working_in(place):
        weights = {name: f"{name}/weights/last_weights.safetensors" for name in ("lora", "whole")}
        return {name: open_task(Path(file), "evaluation").task.sample() for name, file in weights.items()}


def export(place, name, form):
    folder = place / f"{name}_{form}"
    run("export", [f"run_dir={name}", f"format={form}", f"output={folder}", "author=Ann", "trigger=sks"], place)
    return folder


def make_pictures(pipeline):
    return (np.stack([paint(pipeline, text, seed=seed) for seed, text in enumerate(PROMPTS)]) * 255).round()


def differ(first, second):
    """Return the largest difference in grey levels."""
    return np.abs(np.float64(first) - second).max()


def run_program(folder, base, picture="picture.png"):
    """Run the program in the README.md of an export; returns the picture that it writes."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (folder / "program.py").write_text(program.replace("PATH OF THE BASE MODEL", str(base)))
    with working_in(folder):
        runpy.run_path("program.py")
    return np.asarray(Image.open(folder / picture))


def test_a_lora_beside_the_base_gives_the_pictures_of_the_run(place, wanted):
    """And it states the licence of the base."""
    run("evaluate", ["run_dir=lora", "runtime.device=cpu"], place)
    folder = export(place, "lora", "kohya")
    pipeline = StableDiffusionXLPipeline.from_pretrained(place / "base", local_files_only=True)
    assert differ(make_pictures(pipeline), wanted["lora"]) > 20
    pipeline.load_lora_weights(folder / "lora.safetensors")
    assert differ(make_pictures(pipeline), wanted["lora"]) <= 2
    assert differ(run_program(folder, place / "base"), wanted["lora"][0]) <= 2
    header = read_header(place / "lora_kohya/lora.safetensors")[1]
    step, base = read_weights(place / "lora/weights/last_weights.safetensors")[1]["step"], place / "base/unet"
    base = hashlib.sha256((base / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    file = (folder / "lora.safetensors").read_bytes()
    wanted = {
        "modelspec.license": "openrail++", "modelspec.title": "lora", "modelspec.resolution": "96x64",
        "modelspec.prediction_type": "v", "modelspec.author": "Ann", "modelspec.trigger_phrase": "sks",
        "modelspec.description": f"lora of rank 16 of base, after {step} steps of 4 samples on 12 images",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_network_dim": "16", "ss_network_alpha": "8.0",
        "ss_num_train_images": "12", "ss_learning_rate": "0.03", "ss_new_sd_model_hash": base, "ss_steps": str(step),
        "ss_seed": "0", "ss_optimizer": "adamw", "ss_min_snr_gamma": "5.0", "ss_zero_terminal_snr": "True",
        "sshs_model_hash": hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest(),
    }  # fmt: skip
    assert wanted.items() <= header.items() and str(place) not in str(header)
    assert '"resolution": [96, 64]' in header["ss_bucket_info"]
    assert json.loads(header["ss_tag_frequency"])["C"]["tag 37"] == 2
    assert not any("None" in text for text in header.values())
    card = (place / "lora_kohya/README.md").read_text()
    front = front_matter(card)
    assert front["license"] == "openrail++" and front["pipeline_tag"] == "text-to-image"
    assert front["widget"] == [{"text": prompt} for prompt in PROMPTS] and "![samples](samples.png)" in card
    assert front["model-index"][0]["results"][0]["dataset"]["split"] == "validation" and "- peak memory: `" in card
    assert "- trigger: `sks`\n" in card and "- images: `12`\n" in card
    assert (place / "lora_kohya/samples.png").is_file() and str(place) not in card


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_whole_models_give_the_pictures_of_the_run(name, place, wanted):
    folder = export(place, name, "single_file")
    file, base = str(folder / "model.safetensors"), place / "base"
    pipeline = StableDiffusionXLPipeline.from_single_file(file, config=str(base), local_files_only=True)
    assert differ(make_pictures(pipeline), wanted[name]) <= 2
    assert differ(run_program(folder, base), wanted[name][0]) <= 2


def test_a_flow_is_drawn_as_diffusers_draws_its_folder(place):
    """By Euler's method. Its exports are bases of flow, and predict.py draws the same pictures of them."""
    words = ["task.noise.prediction_type=flow", "task.noise.zero_terminal_snr=false", "task.timesteps.shift=2.5"]
    words += ["task.loss.weighting=none", "task.lora=null", "model.vae=vae", "run_dir=flow"]
    run("finetune_sdxl", [*SHORT, *words, "task.noise.convert=true"], place)
    with working_in(place):
        wanted = open_task(Path("flow/weights/last_weights.safetensors"), "evaluation").task.sample()
    folder, file = export(place, "flow", "diffusers"), export(place, "flow", "single_file") / "model.safetensors"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert differ(make_pictures(pipeline), wanted) <= 1 and differ(run_program(folder, None), wanted[0]) <= 1
    names, header = read_header(file)
    assert (header["modelspec.prediction_type"], header["ss_discrete_flow_shift"]) == ("flow", "2.5")
    assert not {"v_pred", "ztsnr"} & names.keys()
    write_json(place / "prompts.json", [{"text": text, "seed": n} for n, text in enumerate(PROMPTS)])
    words = ["prompts=prompts.json", "pictures.image_size_hw=[64,64]", "pictures.steps=3", "device=cpu"]
    for number, base in enumerate((folder, file)):
        run("predict", [*words, f"weights={base}", f"output=drawn_{number}"], place)
        drawn = [Image.open(place / f"drawn_{number}/0000{seed}-{seed}.png") for seed in range(2)]
        assert differ(np.stack(drawn), wanted) <= 1 and "Sampler: Euler" in drawn[0].text["parameters"]


def test_a_whole_model_needs_the_base_of_the_run(place):
    file = place / "base/vae/diffusion_pytorch_model.safetensors"
    original = file.read_bytes()
    file.write_bytes(original[:-4] + bytes(4))
    try:
        with refuses("was trained with another frozen vae; restore it, or set model.path"):
            export(place, "lora", "single_file")
    finally:
        file.write_bytes(original)


def test_another_vae_and_other_values_are_refused_on_resume(place, tmp_path):
    words = [*SHORT, "task.lora=null", "run_dir=whole", "loop.total_steps=3"]
    for other in ("model.vae=base", "model.vae=null"):
        with refuses("model.vae"):
            run("finetune_sdxl", [*words, other], place)
    config = place / "vae/config.json"
    original = config.read_text()
    try:
        config.write_text(original.replace("0.2", "0.3"))
        with refuses("model.vae_values.scaling_factor: 0.2 in the run, 0.3 now"):
            run("finetune_sdxl", [*words, "model.vae=vae"], place)
        (place / "vae").rename(tmp_path / "moved")  # the values are those of the run
        run("evaluate", ["run_dir=whole", "runtime.device=cpu", f"model.vae={tmp_path / 'moved'}"], place)
    finally:
        (tmp_path / "moved").rename(place / "vae")
        config.write_text(original)


def test_a_base_that_lies_elsewhere_is_named_and_a_lora_needs_none(place, tmp_path):
    (place / "base").rename(tmp_path / "moved")
    try:
        export(place, "lora", "kohya")
        for moved in ([], [f"model.path={place / 'images'}"]):
            with refuses(r"^model\.path: "):
                run("export", ["run_dir=lora", "format=single_file", "output=x", *moved], place)
        run("export", ["run_dir=lora", "format=single_file", "output=x", f"model.path={tmp_path / 'moved'}"], place)
        run("evaluate", ["run_dir=lora", "runtime.device=cpu", f"model.path={tmp_path / 'moved'}"], place)
    finally:
        (tmp_path / "moved").rename(place / "base")


def test_a_lora_of_a_whole_unet_is_refused(place):
    with refuses("^format: kohya is for a LoRA"):
        run("export", ["run_dir=whole", "format=kohya", "output=refused"], place)
    assert not (place / "refused").exists()


@pytest.mark.parametrize("name, form", [("lora", "kohya"), ("whole", "diffusers")])
def test_a_file_that_differs_from_the_network_is_not_kept(name, form, place, monkeypatch):
    """Here a writer that changes one value of each file."""

    def write(path, tensors, metadata=None):
        last = list(tensors)[-1] if form != "kohya" else next(name for name in tensors if "up" in name)
        write_tensors(path, {**tensors, last: tensors[last] + 1}, metadata)

    monkeypatch.setattr("sdxl.files.checkpoints.write_tensors", write)
    with refuses("tolerance|output: .*not written"):
        run("export", [f"run_dir={name}", f"format={form}", "output=differs"], place)
    assert not list((place / "differs").glob("*.safetensors")) and not (place / "differs/unet").exists()
