"""Weights of any step: kept by `loop.keep_weights_every`, or in a checkpoint; named, exported, side by side."""

import pytest
import torch

from models.interop import onnx_int8
from tests.in_process import TINY, make_images, run, run_command, run_until_killed
from tests.support import TINY as TINY_TASKS
from tests.support import assert_same_tensors, refuses
from utils.io.weight_files import choose_weights, find_weights
from utils.io.weights import read_header, read_weights

RUN = [*TINY, "data.root=images", "loop.total_steps=5", "loop.keep_weights_every=2", "loop.ema_decay=0.5"]
RUN += ["loop.evaluate_every_epochs=50"]  # at the end
ON_CPU = ["runtime.device=cpu", "runtime.threads=1"]


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with a run that was killed before its fifth update, and one that was not."""
    make_images(folder / "images")
    run("train", [*RUN, "run_dir=whole"], folder)
    run_until_killed("train", [*RUN, "run_dir=killed", "loop.checkpoint_every_steps=3"], folder, 4)
    for left in (".step_000004.safetensors.7.tmp", "step_000900.safetensors"):
        (folder / "killed/weights" / left).touch()
    run("train", [*RUN, "run_dir=killed"], folder)
    return folder


def test_averages_are_kept_at_every_multiple_and_the_end_and_a_killed_run_leaves_the_same(place):
    names = [f"step_00000{step}.safetensors" for step in (2, 4, 5)]
    for name in ("whole", "killed"):
        assert sorted(file.name for file in (place / name / "weights").iterdir() if "step" in file.name) == names
    for name in names:
        (ours, facts), (theirs, _) = (read_weights(place / each / "weights" / name) for each in ("whole", "killed"))
        assert facts["average"]
        assert_same_tensors(ours, theirs)
    last, _ = read_weights(place / "whole/weights/ema_weights.safetensors")
    assert_same_tensors(ours, last)


def test_any_step_is_named_by_its_file_or_its_checkpoint(place, monkeypatch, capsys):
    whole, checkpoint = str(place / "whole"), place / "whole/checkpoints/step_00000005"
    kept = place / "whole/weights/step_000002.safetensors"
    for name in ("step_000002", kept.name, str(kept)):
        assert choose_weights(whole, name) == kept
    assert [find_weights(str(checkpoint), which).stem for which in ("best", "last", "ema")] == [
        "average_weights", "weights", "average_weights",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.chdir(place)
        for weights in ("step_000002", "whole/checkpoints/step_00000005"):
            assert "top1" in run("evaluate", ["run_dir=whole", f"weights={weights}", *ON_CPU], place)
        run("export", ["format=safetensors", "run_dir=whole", "weights=step_000002"], place)
        run("predict", [f"weights={checkpoint}", "input=images", "output=found.csv", "device=cpu"], place)
        tuned = [word for word in RUN if not word.startswith("model")]  # the network follows the file's run
        for number, source in enumerate((kept, checkpoint)):
            words = [*tuned, f"init_from={source}", f"run_dir=tuned{number}", "loop.total_steps=1"]
            assert run_command("finetune", words, place, monkeypatch) == 0
    assert run_command("evaluate", ["run_dir=whole", "weights=step_000003"], place, monkeypatch) == 2
    assert "step_000002, step_000004, step_000005" in capsys.readouterr().err


def test_best_weights_of_few_validation_images_and_pictures_by_a_step(place):
    pytest.importorskip("diffusers", reason="make install-sdxl")
    from sdxl.files.family import draw_networks
    from sdxl.lora.files import read_lora

    sizes = ["loop.batch_size=2", "loop.micro_batch_size=2", "task.chunk=2", "loop.total_steps=2"]
    words = [*TINY_TASKS["diffusion"], *ON_CPU, *sizes, "loop.keep_weights_every=1", "data.root=images", "optim.lr=0.1"]
    run("finetune_sdxl", [*words, "task.lora=null", "loop.best=loss", "run_dir=whole_sdxl"], place)
    run("finetune_sdxl", [*words, "run_dir=sdxl"], place)
    assert (place / "whole_sdxl/weights/best_weights.safetensors").exists()
    assert not (place / "sdxl/weights/best_weights.safetensors").exists()  # four validation images
    files = [place / f"sdxl/weights/step_000001{end}.safetensors" for end in ("", "_lora")]  # ours, and ComfyUI's
    ours, theirs = (read_lora(file, draw_networks()) for file in files)
    assert all(torch.equal(ours[name].matrix(), theirs[name].matrix()) for name in ours.keys() | theirs.keys())
    shapes, header = read_header(files[1])
    assert all(name.startswith("lora_unet_") for name in shapes) and header["ss_network_dim"] == "16"
    facts = (
        "seed steps num_epochs bucket_info resolution optimizer lr_scheduler learning_rate min_snr_gamma noise_offset"
    )
    assert {f"ss_{name}" for name in f"{facts} zero_terminal_snr".split()} | {"sshs_model_hash"} <= header.keys()
    lora = ["weights=sdxl/checkpoints/step_00000002", f"lora=[{files[1]}]", "prompts=p.txt"]
    (place / "p.txt").write_text("red")
    assert "1 pictures" in run("predict", [*lora, "output=drawn", "device=cpu", "dry_run=true"], place)


def test_an_int8_file_is_kept_with_its_figures_if_it_is_faster(place, monkeypatch):
    seconds = iter([[0.002, 0.003], [0.001], [0.001], [0.001]])  # turns of both files, in two exports
    monkeypatch.setattr(onnx_int8, "repeat", lambda *_, **__: next(seconds))
    words = ["precision=int8", "run_dir=whole"]
    run("export", words, place)
    assert "4 validation images); an image takes 2.00 ms, 1.00 ms`" in (place / "whole/export/README.md").read_text()
    with refuses("^precision: .*1.00 ms, 1.00 ms"):
        run("export", words, place)
