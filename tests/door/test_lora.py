"""A dog: 15 photographs without texts and a base that predicts epsilon end as a LoRA for ComfyUI (docs/lora.md)."""

import json
import shutil

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="make install-sdxl")

from tests.door.follow import follow
from tests.in_process import configure, run
from tests.small_sdxl import EPSILON, complete, write_base
from tests.support import TINY, refuses
from utils.io.files import read_json, write_json
from utils.io.weights import read_header
from utils.record.run_reader import RunReader

ON_CPU = [*TINY["diffusion"][2:], "runtime=reference", "runtime.device=cpu", "runtime.threads=1"]
COMMAND = ["experiment=sdxl/lora", "model.path=base", "data.root=dog", *ON_CPU]


@pytest.fixture(scope="module")
def place(folder):
    """Photographs as a telephone names them, a base, and prompts as sd-scripts takes them."""
    torch.manual_seed(0)
    write_base(folder / "base", noise=EPSILON)
    (folder / "dog").mkdir()
    for number in range(15):
        size = (120, 90) if number % 3 else (90, 120)
        Image.new("RGB", size, (90, 60, 9 * number)).save(folder / f"dog/IMG_{number:04}.JPG")
    (folder / "dog/.DS_Store").write_bytes(b"Bud1")
    line = "a photo of sks dog on a beach --n blurry --w 64 --h 96 --d 7 --l 5 --s 2"
    (folder / "prompts.txt").write_text(f"# what the dog does\n{line}\na photo of sks dog --w 64 --h 64 --s 2\n")
    return folder


def test_the_page_leads_from_photographs_to_comfyui(place, capsys):
    with refuses('none of the 15 images .*data.trigger="sks dog"'):  # what a newcomer types first
        run("finetune_sdxl", [*COMMAND, "run_dir=first"], place)
    words = {"BASE": "base", "PATH": "dog", "FILE": "outputs/dog/export/kohya/lora.safetensors"}
    short = {
        "finetune_sdxl.py": [*ON_CPU, "loop.total_steps=3"],
        "predict.py": ["device=cpu"],
        "evaluate.py": ["runtime.device=cpu"],
    }
    results = follow("lora.md", place, words, short)
    said = capsys.readouterr().err
    assert results[0].startswith("dry run: ") and "the trigger alone 15" in said
    assert "base predicts epsilon, which is trained" in said and "all 15 images are for training" in said
    assert RunReader(place / "outputs/dog").config["task"]["noise"]["zero_terminal_snr"] is False
    assert [file.name for file in (place / "outputs/dog/weights").iterdir()] == ["last_weights.safetensors"]
    assert "python export.py format=kohya run_dir=outputs/dog" in said and "python evaluate.py" not in said

    header = read_header(place / "outputs/dog/export/kohya/lora.safetensors")[1]
    assert (header["modelspec.trigger_phrase"], header["modelspec.prediction_type"]) == ("sks dog", "epsilon")
    assert json.loads(header["ss_tag_frequency"]) == {"dog": {"sks dog": 15}}
    assert header["ss_num_train_images"] == "15" and "3 steps of 8 samples on 15 images" in str(header)
    card = (place / "outputs/dog/export/kohya/README.md").read_text()
    assert "- trigger: `sks dog`" in card and "- images: `15`" in card

    pictures = sorted((place / "outputs/dog/pictures").glob("*.png"))
    assert [Image.open(file).size for file in pictures] == [(64, 96), (64, 64)]
    assert (
        "a photo of sks dog on a beach\nNegative prompt: blurry\nSteps: 2" in Image.open(pictures[0]).text["parameters"]
    )


def test_each_picture_is_seen_often_and_the_run_begins_with_a_tenth_of_warm_up(place, capsys):
    trigger = ["data.trigger=sks dog", "dry_run=true"]
    for words, length, warmup in (
        (
            [],
            "2,000 samples (loop.total_epochs=auto): 133.3 epochs",
            "warm-up 25 steps, not 100: schedule.warmup_most=0.1",
        ),
        (["loop.total_epochs=20"], "304 samples: 20.3 epochs", "warm-up 3 steps, not 100"),
        (["loop.total_steps=1500"], "12,000 samples: 800 epochs", "warm-up 100 steps"),
        (["loop.minutes=2"], "as many steps as fit", "warm-up of at most 10% of the run"),
    ):
        run("finetune_sdxl", [*COMMAND, *trigger, *words], place)
        said = capsys.readouterr().err
        assert length in said and warmup in said, said


def test_noise_is_that_of_the_base_unless_another_is_wanted(place, log):
    def settle(base, *words):
        words = ["experiment=sdxl/lora", "data.root=dog", "data.concepts=[]", f"model.path={place / base}", *words]
        noise = complete(configure("finetune_sdxl", words)[0]).task.noise
        return noise.prediction_type, noise.zero_terminal_snr

    assert settle("base", "task.noise.convert=true") == ("v_prediction", True)
    assert settle("base", "task.noise.prediction_type=v_prediction", "task.noise.convert=true") == (
        "v_prediction",
        True,
    )
    assert settle("base", "task.noise.prediction_type=epsilon") == ("epsilon", False)
    write_base(place / "flow", noise={"prediction_type": "flow", "zero_terminal_snr": False})
    with refuses("task.loss.weighting: min_snr is for epsilon and v.*set task.loss.weighting=none"):
        settle("flow")
    assert settle("flow", "task.loss.weighting=none") == ("flow", False)
    shutil.copytree(place / "base", place / "silent")
    file = place / "silent/scheduler/scheduler_config.json"
    values = read_json(file)
    del values["prediction_type"]
    write_json(file, values)
    assert "does not say" not in log.text
    assert settle("silent") == ("epsilon", False) and "silent does not say what it predicts" in log.text
    typed = ["task.noise.prediction_type=v_prediction", "task.noise.zero_terminal_snr=true"]
    assert settle("silent", *typed) == ("v_prediction", True)  # its user knows
    with refuses("task.noise: .*base is a model of task.noise.prediction_type=epsilon"):
        settle("base", *typed)
