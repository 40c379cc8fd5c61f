"""predict.py prompts=FILE: pictures of SDXL equal diffusers', carry their parameters, and go on after a kill."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("diffusers", reason="make install-sdxl")

import diffusers
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

import sdxl.pictures.painter
from sdxl.lora.lora import save_lora
from tests.in_process import Killed, run, run_command
from tests.sdxl.test_diffusion_exports import export, place  # noqa: F401 (a fixture)
from tests.sdxl.test_lora_layers import build_lora, build_networks, vary
from tests.small_sdxl import paint

SIZE = ["pictures.image_size_hw=[64,64]", "pictures.steps=3", "device=cpu"]
OWN = {"text": "a dog", "negative": "grey, low: quality", "image_size_hw": [96, 64], "guidance": 3.0, "seed": 7}


@pytest.fixture(scope="module")
def prompts(place):  # noqa: F811
    """Prompts of three pictures, and a LoRA beside the base."""
    (place / "prompts.yaml").write_text(yaml.safe_dump(["a cat, outdoors", OWN]))
    (place / "cats.txt").write_text("a cat, outdoors\n\n")
    save_lora(
        place / "style.safetensors", vary(build_lora(build_networks())).changes(), torch.float32, {"title": "toy"}
    )
    return place


def draw(place, output, *words):  # noqa: F811
    """Draw, and return the pictures [H, W, 3] by name."""
    run("predict", [f"output={output}", *SIZE, *words], place)
    return {file.name: np.array(Image.open(file)) for file in sorted((place / output).glob("0*.png"))}


def differ(first, second):
    """Return the largest difference in grey levels."""
    return max(np.abs(np.float64(first[name]) - second[name]).max() for name in first)


def test_pictures_equal_those_of_diffusers_on_the_exported_folder_and_carry_their_parameters(prompts):
    drawn = draw(prompts, "drawn", "weights=lora", "prompts=prompts.yaml", "pictures.seeds=[0,1]")
    assert [*drawn] == ["00000-0.png", "00001-1.png", "00002-7.png"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(export(prompts, "lora", "diffusers"), local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    wanted = [paint(pipeline, "a cat, outdoors"), paint(pipeline, "a cat, outdoors", seed=1)]
    wanted += [paint(pipeline, "a dog", OWN["negative"], 96, 3.0, 7)]
    for picture, theirs in zip(drawn.values(), wanted, strict=True):
        assert np.abs(theirs - picture / 255).max() <= 1e-3 + 0.5 / 255  # half a level: PNGs are rounded
    text, settings = Image.open(prompts / "drawn/00002-7.png").text["parameters"].split("\nSteps: ")
    assert text == "a dog\nNegative prompt: grey, low: quality"
    assert settings.startswith("3, Sampler: DDIM, CFG scale: 3, Seed: 7, Size: 64x96, Model hash: ")
    assert settings.endswith(", Model: lora, CFG Rescale: 0.7, Version: Atelier")
    assert not (prompts / "drawn/.journal").exists()


@pytest.mark.parametrize(
    "sampler, named, kind",
    [
        ("euler", "Euler", "EulerDiscrete"),
        ("euler_a", "Euler a", "EulerAncestralDiscrete"),
        ("dpmpp_2m", "DPM++ 2M", "DPMSolverMultistep"),
    ],
)
def test_samplers_are_those_of_diffusers(sampler, named, kind, prompts):
    drawn = draw(prompts, sampler, "weights=base", "prompts=cats.txt", f"pictures.sampler={sampler}")["00000-0.png"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(prompts / "base", local_files_only=True)
    pipeline.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(pipeline.scheduler.config)
    assert np.abs(paint(pipeline, "a cat, outdoors") - drawn / 255).max() <= 1e-3 + 0.5 / 255
    assert f"Sampler: {named}," in Image.open(prompts / sampler / "00000-0.png").text["parameters"]


def test_a_lora_beside_a_base_equals_its_run_and_strength_scales_it(prompts, caplog):
    words = ["prompts=cats.txt"]
    run_drawn, base = (draw(prompts, f"by_{name}", f"weights={name}", *words) for name in ("lora", "base"))
    kohya = export(prompts, "lora", "kohya") / "lora.safetensors"
    by_strength = {
        strength: draw(prompts, f"at_{strength}", "weights=base", *words, f"lora=[{kohya}:{strength}]")
        for strength in (0.0, 0.5, 1.0)
    }
    assert differ(by_strength[0.0], base) == 0 and differ(by_strength[1.0], run_drawn) <= 1
    assert differ(by_strength[0.5], base) > 5 and differ(by_strength[0.5], run_drawn) > 5
    said = Image.open(prompts / "at_0.5/00000-0.png").text["parameters"]
    assert said.startswith("a cat, outdoors <lora:lora:0.5>\nSteps: 3") and 'Lora hashes: "lora: ' in said
    assert differ(draw(prompts, "both", "weights=lora", *words, "lora=[lora:-1,style.safetensors:0.0]"), base) <= 1


def test_several_weights_have_a_folder_each_and_a_page(prompts):
    words = ["output=two", *SIZE, "prompts=cats.txt", "weights=[base,lora]"]
    assert "2 pictures, 0 there" in run("predict", words, prompts)
    base = draw(prompts, "one", "weights=base", "prompts=cats.txt")
    assert differ(draw(prompts, "two/0-base", "weights=base", "prompts=cats.txt", "existing=skip"), base) == 0
    assert (prompts / "two/1-lora/00000-0.png").exists()
    assert np.asarray(Image.open(prompts / "two/grid.png")).std() > 10


def test_parameters_say_how_brackets_were_read(prompts, caplog):
    (prompts / "marked.txt").write_text("a (cat:1.4) --n [grey]")
    drawn = {}
    for emphasis, said in (("null", r"a \(cat:1.4\)|\[grey\]|"), ("true", "a (cat:1.4)|(grey:0.9091)|")):
        drawn[emphasis] = draw(
            prompts, f"{emphasis}_", "weights=base", "prompts=marked.txt", f"pictures.emphasis={emphasis}"
        )
        text = Image.open(prompts / f"{emphasis}_/00000-0.png").text["parameters"]
        assert text.startswith(said.replace("|", "\nNegative prompt: ", 1).replace("|", "\nSteps: 3"))
    assert differ(drawn["null"], drawn["true"]) > 0
    assert "1 of 1 have brackets, which are read as text" in caplog.text


def test_a_killed_command_goes_on_and_other_pictures_stay(prompts, monkeypatch):
    words = ["weights=base", "prompts=prompts.yaml", "pictures.seeds=[0,1]"]
    wanted, made, sample = draw(prompts, "straight", *words), [], sdxl.pictures.painter.sample_pictures

    def fatal(*arguments):
        for picture in sample(*arguments):
            made.append(picture)
            if len(made) == 2:
                raise Killed
            yield picture

    monkeypatch.setattr("sdxl.pictures.painter.sample_pictures", fatal)
    with pytest.raises(Killed):
        draw(prompts, "killed", *words)
    assert draw(prompts, "killed", *words).keys() == wanted.keys() and len(made) == 4  # the first picture was kept
    for file in (prompts / "straight").iterdir():
        assert (prompts / "killed" / file.name).read_bytes() == file.read_bytes()

    with pytest.raises(ValueError, match=r"^existing: null, but killed/00000-0.png"):
        draw(prompts, "killed", *words)
    (prompts / "killed/00001-1.png").unlink()
    draw(prompts, "killed", *words, "existing=skip")
    assert len(made) == 5
    draw(prompts, "killed", *words, "existing=overwrite")
    assert len(made) == 8


@pytest.mark.parametrize(
    "text, words, said",
    [
        ("- a\n- {text: b, sede: 1}", [], "prompts.1.sede: unknown key; close: "),
        ("- {negative: b}", [], "prompts.0.text: "),
        ("[]", [], "prompts: "),
        ("[", [], "prompts: wrong.yaml is not a readable"),
        ("- a", ["input=images"], "input: "),
        ("- a", ["input=images", "prompts=null", "weights=[base,base]"], "weights: several"),
        ("- a", ["existing=append"], "existing: append"),
        ("- a", ["lora=[style.safetensors:much]"], "lora: style.safetensors:much is no file"),
        ("- a", ["lora=[base/unet/diffusion_pytorch_model.safetensors]"], "is no LoRA of SDXL"),
        ("- a", ["weights=style.safetensors"], "is a checkpoint of a LoRA"),
        ("- a", ["weights=images"], "weights: "),
        ("- a", ["model.path=base"], "base is a base model that cannot be sampled so: model.path"),
    ],
)
def test_what_is_wrong_is_named_with_status_2(text, words, said, prompts, monkeypatch, capsys):
    (prompts / "wrong.yaml").write_text(text)
    given = ["weights=base", "prompts=wrong.yaml", "output=refused", *SIZE, *words]
    assert run_command("predict", given, prompts, monkeypatch) == 2
    assert said in capsys.readouterr().err and not (prompts / "refused").exists()
