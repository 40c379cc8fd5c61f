"""No file of an export names a folder, the user or the machine of its run: it may be given to others."""

import shutil
import socket

import pytest

pytest.importorskip("diffusers", reason="make install-sdxl")

from engine.exports.config import FORMATS
from tests.in_process import SHORT, make_images, run
from tests.small_sdxl import write_base
from tests.support import TINY, set_variables
from utils.io.weights import read_weights

MODEL = ["model=convnextv2_atto", "model.depths=[1,1,1,1]", "model.dims=[8,12,16,20]", "augment.image_size_hw=[32,32]"]
ONE = ["runtime=reference", "runtime.device=cpu", "runtime.threads=1", "loop.total_steps=1", "loop.batch_size=4"]


def test_no_file_of_an_export_names_a_place(tmp_path, monkeypatch):
    home = tmp_path / "qz-home"
    set_variables(monkeypatch, {"HOME": str(home), "LOGNAME": "qz-user", "USER": "qz-user"})
    monkeypatch.setattr(socket, "gethostname", lambda: "qz-host")
    monkeypatch.setattr("models.interop.page._read_runtime", str.encode)  # which export.py would fetch
    images = make_images(home / "images")
    for file in images.rglob("*.png"):
        file.with_suffix(".txt").write_text("disc, black")
    write_base(home / "base")
    tagger = ["task=tagging", "task.min_count=1", "data=image_folder", *SHORT, *MODEL, f"data.root={images}"]
    run("finetune", [*tagger, f"run_dir={home}/first"], home)
    vocabulary = shutil.copy(home / "first/selected_tags.csv", home / "tags.csv")
    run("finetune", [*tagger, f"init_from={home}/first", f"task.vocabulary={vocabulary}", "run_dir=tagger"], home)
    classifier = [*SHORT, *MODEL, "data=image_folder", "augment=glyphs", f"data.root={images}"]
    run("finetune", [*classifier, f"init_from={home}/first", "run_dir=classifier"], home)
    pictures = [*ONE, f"model.path={home}/base", f"data.root={images}"]
    run("finetune_sdxl", [*TINY["diffusion"], *pictures, "optim.lr=0.01", "run_dir=lora"], home)
    run("finetune_vae", [*TINY["autoencoder"], *pictures, "run_dir=vae"], home)
    of = {
        "kohya": "lora",
        "single_file": "lora",
        "diffusers": "lora",
        "vae": "vae",
        "vae_diffusers": "vae",
    }
    for form in FORMATS:
        name = of.get(form, "tagger")
        run("export", [f"format={form}", f"run_dir={home}/{name}", f"output={home}/made/{form}"], home)
    files = [file for file in (home / "made").rglob("*") if file.is_file()]
    files += [file for name in ("tagger", "classifier", "lora", "vae") for file in (home / name).rglob("*.safetensors")]
    assert [file for file in files if b"qz-" in file.read_bytes()] == [] and len(files) > 2 * len(FORMATS)
    origin = read_weights(home / "tagger/weights/last_weights.safetensors")[1]["origin"]
    earlier = read_weights(home / "first/weights/last_weights.safetensors")[1]["weights_hash"]
    assert origin["source"] == "last_weights.safetensors" and origin["weights_hash"] == earlier
    run("evaluate", [f"run_dir={home}/lora", "runtime.device=cpu"], home)  # the run knows where its base model is
