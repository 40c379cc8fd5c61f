"""Weights through the commands: weights of others as a run of no steps, timm's weights, licences, exports, refusals."""

import re

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from models.build import build_network
from models.config import ConvNeXtV2Config
from models.interop.parity import vary_weights
from tests.in_process import SHORT, TINY, make_images, run
from tests.support import assert_same_tensors, front_matter, refuses
from tests.support import rows as rows_of
from utils.io.files import read_json, write_json
from utils.io.weights import read_weights, write_weights

MODEL = ["model=convnextv2_atto", "model.depths=[1,1,1,1]", "model.dims=[8,12,16,20]"]
SMALL = [*MODEL, *SHORT, "augment=glyphs", "augment.image_size_hw=[32,32]", "data=image_folder", "data.root=images"]
ON_CPU = ["runtime.device=cpu", "runtime.threads=1", "runtime.workers=0", "runtime.precision=fp32"]
DATA = ["data=image_folder", "data.root=images"]
IMAGES = [*DATA, "augment.image_size_hw=[32,32]", *ON_CPU]
RESNET = "test_resnet.r160_in1k"
CONFIG = ConvNeXtV2Config(
    family="convnextv2", name="convnextv2_atto", in_channels=3, depths=[1, 1, 1, 1], dims=[8, 12, 16, 20],
    stem_stride=4, drop_path_rate=0.0, head_init_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with images of classes A and B, and a run with an average, trained from a released-like file."""
    make_images(folder / "images")
    torch.save({"model": vary_weights(build_network(CONFIG, 0)).state_dict()}, folder / "fcmae.pt")
    run("finetune", [*SMALL, "init_from=fcmae.pt", "run_dir=run", "loop.ema_decay=0.5", "optim.lr=0.01"], folder)
    return folder


def weights_of(place, run, name="last"):
    """Return tensors and metadata of a weight file of a run."""
    return read_weights(place / f"{run}/weights/{name}_weights.safetensors")


def metrics(folder, *overrides):
    run("evaluate", [*overrides, "output=found"], folder)
    found = read_json(max((folder / "found").glob("metrics*.json"), key=lambda file: file.stat().st_mtime_ns))
    return {name: value for name, value in found.items() if name not in ("weights", "measured", "step", "seconds")}


def test_results_without_a_run_lie_below_outputs_by_file_and_collection(place):
    """Two runs' best weights have one name; the same command finds its folder again."""
    (place / "other").mkdir(exist_ok=True)
    tensors, metadata = weights_of(place, "run", "best")
    write_weights(place / "other/own_weights.safetensors", tensors, metadata)
    write_weights(place / "own_weights.safetensors", tensors, {**metadata, "step": 99})
    for name in ("own_weights", "other/own_weights", "own_weights"):
        run("evaluate", [f"weights={name}.safetensors", *DATA, *ON_CPU], place)
    folders = (place / "outputs/evaluate").glob("own_weights-*")
    found = sorted((read_json(folder / "metrics.json") for folder in folders), key=lambda values: -values["step"])
    assert [values["step"] for values in found] == [99, metadata["step"]]
    wanted = metrics(place, "run_dir=run", "weights=best", *ON_CPU)
    assert found[1].items() >= wanted.items() and wanted["samples"] == 4


def test_the_card_of_an_export_says_how_the_weights_were_trained_and_names_no_path(place):
    """Figures with their interval are those of evaluate.py."""
    run("evaluate", ["run_dir=run", "weights=best", *ON_CPU], place)
    (place / "more.md").write_text("## Thanks\n\nto all, with hf_abcdefghijklmnopqrstuvwxyz")
    words = ["format=safetensors", "run_dir=run", "weights=best", "output=carded"]
    with refuses(r"^card: none\.md .*Markdown"):
        run("export", [*words, "card=none.md"], place)
    typed = {
        "command": ["finetune.py", "experiment=a/b", f"data.root={place}/images", "init_from=hf:a/b@main", "run_dir=x"]
    }
    environment = read_json(place / "run/environment.json")
    write_json(place / "run/environment.json", environment | typed)
    (place / "run/plots/curves.png").touch()
    run("export", [*words, "card=more.md"], place)
    text = (place / "carded/README.md").read_text()
    front = front_matter(text)
    assert (front["license"], front["pipeline_tag"]) == ("cc-by-nc-4.0", "image-classification")
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation" and {"top1", "loss"} <= {m["type"] for m in result["metrics"]}
    assert "- images: `8`\n- validation images: `4`" in text and "- precision: `" in text
    assert re.search(r"- recipe: `[0-9a-f]{8}`", text) and f"- commit: `{environment['git']['commit'][:12]}`" in text
    assert "95 % interval" in text and str(place) not in text
    assert "- command: `python finetune.py experiment=a/b data.root=images init_from=hf:a/b@main`\n" in text
    assert "- peak memory: `" in text and "- device: `CPU`" in text
    assert "![curves](curves.png)" in text and (place / "carded/curves.png").is_file()
    assert "N/A" not in text and text.endswith("## Thanks\n\nto all, with ***\n")


def card_of(folder):
    """Return the front matter and the text of an export's card."""
    text = (folder / "README.md").read_text()
    return front_matter(text), text


def test_a_card_has_the_figure_that_chose_the_weights_if_nothing_else_measured_them(place):
    run("finetune", [*SMALL, "init_from=fcmae.pt", "run_dir=unmeasured"], place)
    run("export", ["format=safetensors", "run_dir=unmeasured", "output=new"], place)
    (result,) = card_of(place / "new")[0]["model-index"][0]["results"]
    best = read_json(place / "unmeasured/result.json")
    assert result["dataset"]["split"] == "validation"
    assert {"type": "top1", "value": best["value"]} in result["metrics"]
    assert "- `few validation images; by cross-validation, " in card_of(place / "new")[1]


def test_the_card_of_an_fcmae_has_its_loss_and_reconstructions(place):
    run("pretrain_fcmae", [*TINY, "task.decoder_dim=16", "data.root=images", "run_dir=fcmae"], place)
    run("export", ["format=safetensors", "run_dir=fcmae", "output=features"], place)
    front, text = card_of(place / "features")
    assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "loss"
    assert "![reconstructions](reconstructions.png)" in text and "- command: `python " in text


def test_an_export_comes_back_as_a_run_of_no_steps(place):
    """With the same figures, the licence, and classes in the file's order where it names them."""
    wanted = metrics(place, "run_dir=run", "weights=last", *ON_CPU)
    run("export", ["format=timm", "run_dir=run", "weights=last"], place)
    words = ["init_from=run/export/timm", "task.head=kept", "loop.total_steps=0", "run_dir=back"]
    run("finetune", [*SMALL, *words], place)
    found = metrics(place, "run_dir=back", *ON_CPU)
    assert found == pytest.approx(wanted, abs=1e-5) and found["samples"] == 4
    origin = weights_of(place, "back")[1]["origin"]  # the file beside the weights states the licence
    assert (origin["license"], origin["layout"]) == ("cc-by-nc-4.0", "timm")


def test_weights_of_others_become_a_run_of_no_steps(place):
    """They are measured and saved as they are; more steps go on from there."""
    torch.save({"model": vary_weights(build_network(CONFIG, 2)).state_dict()}, place / "two.pt")
    words = [*SMALL, "init_from=two.pt", "task.head=kept", "run_dir=taken", "loop.ema_decay=0.5"]
    run("finetune", [*words, "loop.total_steps=0"], place)
    given, (saved, metadata) = torch.load(place / "two.pt")["model"], weights_of(place, "taken", "best")
    assert_same_tensors(saved, given)
    assert metadata["step"] == 0 and metadata["origin"]["license"] == "cc-by-nc-4.0"
    (row,) = rows_of(place / "taken/metrics.jsonl")
    found = metrics(place, "run_dir=taken", "weights=best", "runtime.precision=fp32", *ON_CPU)
    assert row["ema/top1"] == found["top1"] and row["ema/loss"] == pytest.approx(found["loss"], rel=1e-5)
    run("finetune", [*words, "loop.total_steps=0"], place)  # again: it is complete
    run("finetune", [*words, "loop.total_steps=1"], place)
    assert weights_of(place, "taken")[1]["step"] == 1


def test_the_licence_of_the_source_stays_with_the_run_and_its_exports(place):
    for name in ("last", "best", "ema"):
        origin = weights_of(place, "run", name)[1]["origin"]
        assert (origin["source"], origin["layout"], origin["license"]) == ("fcmae.pt", "official", "cc-by-nc-4.0")
        assert len(origin["weights_hash"]) == 16
    run("export", ["format=timm", "run_dir=run"], place)
    assert read_json(place / "run/export/timm/config.json")["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    assert read_json(place / "run/export/timm/export.json")["model.safetensors"]["license"] == "cc-by-nc-4.0"
    run("export", ["format=safetensors", "run_dir=run", "license=mine", "output=mine"], place)
    assert read_json(place / "mine/export.json")["model.safetensors"]["license"] == "mine"


def test_a_file_without_a_task_is_for_init_from(place):
    with refuses(r"^weights: .*init_from=fcmae\.pt"):
        run("predict", ["weights=fcmae.pt", "input=images", "output=f.jsonl"], place)


def fill_cache(monkeypatch, folder, name, network):
    """Put a network's weights into a cache of the hub, as a download would, and take the network away."""
    repository = folder / f"hub/models--timm--{name}"
    (repository / "snapshots/0").mkdir(parents=True)
    save_file(network.state_dict(), repository / "snapshots/0/model.safetensors", metadata={"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0")
    use_cache(monkeypatch, folder)


def use_cache(monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


TIMM = ["model=timm", *SHORT, *DATA, "augment=glyphs", "augment.image_size_hw=[64,64]"]


def test_timms_weights_come_from_its_cache_with_their_preprocessing(place, monkeypatch, tmp_path):
    network = vary_weights(timm.create_model("test_resnet"))
    fill_cache(monkeypatch, tmp_path, RESNET, network)
    words = [word for word in TIMM if word != "augment=glyphs"]  # whose values would stay
    words += ["augment.image_size_hw=[64,64]", f"model.name={RESNET}", "init_from=timm", "optim.lr=0", "run_dir=timm"]
    run("finetune", words, place)
    config = timm.get_pretrained_cfg(RESNET)
    state, metadata = weights_of(place, "timm")
    for key, value in network.state_dict().items():
        if not key.startswith("fc.") and "running" not in key and "num_batches" not in key:
            assert torch.equal(state[key], value), key
    used = metadata["preprocessing"]
    assert used["mean"] == list(config.mean) and used["eval_crop"] == config.crop_pct
    assert used["interpolation"] == config.interpolation and used["image_size_hw"] == [64, 64]
    assert metadata["origin"] == {"source": f"timm {RESNET}", "layout": "timm", "license": config.license}
    run("evaluate", ["run_dir=timm", *ON_CPU], place)  # rebuilds the network without the hub
    # A kept head has the classes of its pretraining: another number is refused.
    with refuses(rf"^task\.head: kept, but timm {RESNET} has no head of these 2"):
        run("finetune", [*TIMM, f"model.name={RESNET}", "init_from=timm", "task.head=kept", "run_dir=kept"], place)


def test_weights_that_timm_cannot_give_are_refused(place, monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path)
    with refuses("^init_from: "):
        run("finetune", [*TIMM, f"model.name={RESNET}", "init_from=timm", "run_dir=refused"], place)
    assert not (place / "refused").exists()
