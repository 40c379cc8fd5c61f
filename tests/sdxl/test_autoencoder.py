"""finetune_vae.py: both players resume exactly, the encoder stays, diffusers loads exports, figures are right."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="make install-sdxl")

from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from engine.exports.config import MovedBase
from engine.exports.opened_task import open_task
from engine.measures.images import measure_psnr, measure_ssim
from engine.plan import Plan
from engine.tasks.kind import Setup, open_kind
from engine.update.learner import Learner
from engine.update.runtime import choose_runtime
from sdxl.autoencoder_losses import PatchDiscriminator, absolute_error, hinge, pyramid_distance
from sdxl.files.family import draw_networks
from sdxl.files.names import from_single_file, part_state
from sdxl.networks import load_vae
from sdxl.step import encode_images
from tests.in_process import configure, run, run_command, run_until_killed
from tests.sdxl.test_diffusion_exports import run_program
from tests.small_sdxl import write_base
from tests.support import (
    TINY,
    assert_same_tensors,
    checkpoint_tensors,
    front_matter,
    logged,
    make_collection,
    read_table,
    refuses,
    rows,
)
from utils.io.files import read_json

SHORT = [
    *TINY["autoencoder"], "model.path=base", "data.root=images", "runtime=reference", "runtime.device=cpu",
    "runtime.threads=1", "loop.total_steps=6", "loop.batch_size=4", "loop.micro_batch_size=2", "optim.lr=1e-3",
    "loop.ema_decay=0.9", "loop.checkpoint_every_steps=2", "loop.log_every_steps=1",
]  # fmt: skip


VAE = "base/vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(folder):
    """A folder with images, a base model, and a run."""
    make_collection(folder / "images", per_class=4, validation=2)
    write_base(folder / "base")
    run("finetune_vae", [*SHORT, "run_dir=run"], folder)
    return folder


def test_both_players_resume_exactly_and_the_encoder_stays(place):
    run_until_killed("finetune_vae", [*SHORT, "run_dir=killed"], place, step=5)
    run("finetune_vae", [*SHORT, "run_dir=killed"], place)
    straight, killed = (checkpoint_tensors(place / name, 6) for name in ("run", "killed"))
    assert_same_tensors(killed, straight)
    assert any("discriminator" in name for name in straight) and not any("encoder." in name for name in straight)
    assert rows(place / "run/metrics.jsonl") == rows(place / "killed/metrics.jsonl")
    saved = load_file(place / "run/weights/last_weights.safetensors")
    assert {name.split(".")[1] for name in saved} == {"decoder", "post_quant_conv"}
    evaluated = rows(place / "run/metrics.jsonl", "evaluate")
    assert list(evaluated[0])[3:5] == ["ema/loss", "ema/psnr"]  # the first ones are shown
    assert evaluated[-1]["ema/loss"] < evaluated[0]["ema/loss"] and {"ema/psnr", "ema/ssim"} < evaluated[0].keys()
    assert len({row["ema/scaling_factor"] for row in evaluated}) == 1  # the encoder's latents
    assert len(read_table(place / "run/tables/latents.csv")) == 4
    begun = logged(place / "run", "train", "discriminator")
    assert len({round(value, 4) for value in begun}) == 6


def test_a_run_keeps_the_sizes_that_crop_least_and_goes_on_with_them(place):
    rule = ["areas_px=[4096]", "step_px=32", "min_px=32", "max_px=128", "fit=1"]
    base = [word for word in SHORT if "sizes_hw" not in word]
    words = [*base, *(f"task.buckets.{word}" for word in rule), "task.discriminator.weight=0", "run_dir=fitted"]
    for steps in (1, 2):
        run("finetune_vae", [*words, f"loop.total_steps={steps}"], place)
    buckets = read_json(place / "fitted/config.json")["task"]["buckets"]
    log = (place / "fitted/log.txt").read_text()
    assert buckets["sizes_hw"] == [[[64, 64]]] and "task.buckets.fit: the mean share" in log and "resumed from" in log
    with refuses("^task.buckets.sizes_hw: .*task.buckets.fit"):
        run("finetune_vae", [*words, "task.buckets.sizes_hw=[[[64,64],[96,64]]]"], place)


@pytest.fixture(scope="module")
def exported(place):
    """The VAE of the run, which is exported in both formats."""
    for form in ("vae", "vae_diffusers"):
        run("export", ["run_dir=run", f"format={form}", "precision=fp16"], place)
    base = MovedBase(path=str(place / "base"), vae=None)
    return open_task(place / "run/weights/best_weights.safetensors", "export", base).task.vae


def test_exports_are_what_diffusers_and_comfyui_load(place, exported):
    latents = torch.randn(1, 4, 8, 8)
    read = AutoencoderKL.from_pretrained(place / "run/export/vae_diffusers")
    with torch.no_grad():
        assert torch.equal(read.decode(latents).sample, exported.decode(latents).sample)
    base = part_state("vae", draw_networks()["vae"])
    assert all(torch.equal(read.get_parameter(name), base[name]) for name in base if name.startswith("encoder."))
    alone = load_file(place / "run/export/vae/vae.safetensors")
    assert "decoder.up.3.block.0.norm1.weight" in alone and alone["decoder.mid.attn_1.q.weight"].ndim == 4
    state = {f"first_stage_model.{name}": tensor for name, tensor in alone.items()}
    assert_same_tensors(from_single_file("vae", state), part_state("vae", exported))


@pytest.mark.parametrize("form", ["vae", "vae_diffusers"])
def test_the_program_in_the_card_decodes_an_image_again(form, place, exported):
    folder = place / f"run/export/{form}"
    image = np.random.default_rng(0).integers(0, 256, (43, 70, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    with torch.no_grad():
        batch = torch.tensor(image[:40, :64]).permute(2, 0, 1)[None] / 127.5 - 1
        wanted = exported.decode(exported.encode(batch).latent_dist.mode()).sample[0].permute(1, 2, 0)
    assert np.abs(run_program(folder, place / "base", "decoded.png") - ((wanted + 1) * 127.5).numpy()).max() < 1


def test_the_card_has_the_figures_and_pictures_of_the_run(place, exported):
    folder = place / "run/export/vae"
    text = (folder / "README.md").read_text()
    (result,) = front_matter(text)["model-index"][0]["results"]
    assert result["dataset"]["split"] == "validation" and result["metrics"][0]["type"] == "loss"
    assert "![worst](worst.png)" in text and (folder / "worst.png").is_file()
    assert "- command: `python " in text and "- peak memory: `" in text and str(place) not in text


def test_figures_equal_numpys():
    """Of images as large as the window of SSIM."""
    images, other = torch.rand(2, 3, 11, 11), torch.rand(2, 3, 11, 11)
    psnr = 10 * np.log10(1 / ((images - other).numpy().astype(float) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(measure_psnr(images, other), psnr, rtol=1e-5)
    gauss = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(gauss, gauss) / gauss.sum() ** 2

    def blur(values):
        return (values * window).sum((-1, -2))

    x, y = images.double().numpy(), other.double().numpy()
    mean_x, mean_y = blur(x), blur(y)
    spread = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    near = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    found = near * (2 * (blur(x * y) - mean_x * mean_y) + 9e-4) / (spread + 9e-4)
    np.testing.assert_allclose(measure_ssim(images, other), found.mean(axis=1), rtol=1e-4, atol=1e-5)


def test_latents_are_described_by_channel_with_the_factor_that_they_imply():
    config, _ = configure("finetune_vae", [*SHORT, "model.path=null", "task.discriminator.weight=0"])
    task = open_kind("autoencoder").build(Setup(config.model, config.task)).eval()
    task.load_helpers("evaluation")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    valid = {"weight": torch.tensor([1.0, 1.0, 0.0]), "sample_id": torch.arange(3)}
    with torch.no_grad():
        report = task.evaluate({"val": [{"images": images, **valid}]}, 0)
        latents = encode_images(task.vae, images[:2])[0].double().numpy()
    for channel, row in enumerate(report.tables["latents"]):
        own = latents[:, channel]
        assert list(row.values()) == pytest.approx([channel, own.mean(), own.std(), own.min(), own.max()])
    assert (latents * report.scalars["scaling_factor"]).std() == pytest.approx(1)


def test_the_adaptive_weight_is_the_ratio_of_gradients_whatever_the_micro_batches():
    config, _ = configure("finetune_vae", [*SHORT, "model.path=null", "task.discriminator.start_step=0"])
    balances = []
    for size in (4, 2):
        torch.manual_seed(0)
        task = open_kind("autoencoder").build(Setup(config.model, config.task))
        task.load_helpers("training")
        learner = Learner(task, config, Plan(1, 4, size, 1, 40, 10, 0, 1e-3), choose_runtime(config.runtime))
        images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        batch = {"images": images, "key": torch.arange(4), "weight": torch.ones(4), "sample_id": torch.arange(4)}
        last, discriminator = task.vae.decoder.conv_out.weight, task.discriminator
        if size == 4:
            levels, decoded, _ = task._reconstruct(batch)
            ours = task._compare(levels, decoded)[0].mean()
            theirs = -discriminator(decoded).mean()
            norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (ours, theirs)]
            balances.append(float(norms[0] / (norms[1] + 1e-4)))
        learner.update(
            [{name: value[part : part + size] for name, value in batch.items()} for part in range(0, 4, size)]
        )
        balances.append(float(task.balance))
    assert balances[0] > 0 and balances == pytest.approx([balances[0]] * 3, rel=1e-4)


def test_the_discriminators_loss_is_half_the_sum_of_its_hinges():
    """(mean of (0.5, 0) + mean of (0, 1.5)) / 2, from what is missing to 1 and to -1."""
    real, fake = torch.tensor([[[[0.5, 2.0]]]]), torch.tensor([[[[-2.0, 0.5]]]])
    assert hinge(real, fake).tolist() == [0.5]


def test_the_distance_without_weights_sees_blur_and_the_discriminator_sees_patches():
    first = torch.rand(2, 3, 32, 32) * 2 - 1
    blurred = nn.functional.avg_pool2d(first, 3, 1, 1)
    error = torch.full((1, 1, 1, 2), 1e-7).copysign(torch.tensor([1.0, -1.0])).requires_grad_()
    assert torch.autograd.grad(absolute_error(error).sum(), error)[0].abs().max() < 1e-4  # rounding is no direction
    assert pyramid_distance(first, first).eq(0).all() and (pyramid_distance(first, blurred) > 0.1).all()
    assert PatchDiscriminator()(first).shape == (2, 1, 2, 2)


REFUSED = {
    "task.discriminator.start_step": ["task.discriminator.start_step=null"],
    "task.crop_px: must": ["task.crop_px=16"],
    "task.crop_px: 128": ["task.crop_px=128"],
    "task.perceptual.network: must": ["task.perceptual.path=FILE"],
    "task.perceptual.network": ["task.perceptual.network=vgg17"],
    "task.perceptual.path": ["task.perceptual.network=resnet18", f"task.perceptual.path={VAE}"],
    "init_from": ["init_from=run"],
    "model.path": ["model.path=images"],
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused(said, place, monkeypatch, capfd):
    assert run_command("finetune_vae", [*SHORT, "dry_run=true", *REFUSED[said]], place, monkeypatch) == 2
    assert said in capfd.readouterr().err


def test_a_run_is_a_vae_while_its_encoder_is_the_one_of_the_base(place, monkeypatch):
    monkeypatch.chdir(place)
    found = load_vae("run").state_dict()
    trained = load_file("run/weights/best_weights.safetensors")
    assert all(torch.equal(found[name.removeprefix("vae.")], one) for name, one in trained.items())
    content = (place / VAE).read_bytes()
    try:
        tensors = load_file(VAE)
        save_file({**tensors, "encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 1}, VAE)
        with refuses(r"^model\.vae: .*another frozen encoder"):
            load_vae("run")
        (place / "base").rename("moved")
        with refuses(r"^model\.vae: .*began with base"):
            load_vae("run")
    finally:
        (place / "moved").rename(place / "base")
        (place / VAE).write_bytes(content)
