"""task=diffusion: the loss of each sample, what is kept, exact resume, and the pictures."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="make install-sdxl")

from engine.task import networks_of
from engine.tasks.kind import Setup
from sdxl.config import Prompt
from sdxl.files.family import ENCODERS
from sdxl.files.tokenizer import tokenize
from sdxl.kind import DiffusionKind
from sdxl.pictures.novelty import find_nearest_images
from sdxl.pictures.sampling import encode_prompt
from sdxl.pictures.texts import text_field
from sdxl.step import (
    NOISE_DRAW,
    OFFSET_DRAW,
    PERTURBATION_DRAW,
    TIMESTEP_DRAW,
    add_coarse_noise,
    decode_latents,
)
from tests.in_process import check_resumption, configure, run
from tests.small_sdxl import complete
from tests.support import TINY, checkpoint_tensors, make_collection, read_table, refuses, rows, samples_by_step
from utils import rng
from utils.io.files import read_json

REFERENCE = ["runtime=reference", "runtime.device=cpu", "runtime.threads=1"]
SHORT = [*TINY["diffusion"], *REFERENCE, "loop.log_every_steps=1", "loop.total_steps=3", "optim.lr=0.01"]
SHORT += ["loop.evaluate_every_epochs=1"]  # and at the end
FIVES = ["loop.batch_size=10", "loop.micro_batch_size=5", "task.chunk=5"]


def build(*overrides):
    """Return a task as a run builds it."""
    config, _ = configure("finetune_sdxl", [*TINY["diffusion"], "data.root=IMAGES", "data.concepts=[]", *overrides])
    torch.manual_seed(0)
    task = DiffusionKind().build(Setup(config.model, complete(config).task))
    task.load_helpers("training")
    return task.train()


def make_batch(count=4, caption="a cat"):
    draw = torch.Generator().manual_seed(0)
    return {
        "key": torch.arange(count),
        "weight": torch.ones(count),
        "images": torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=draw),
        "fit": torch.tensor([[80, 64, 8, 0, 64, 64]]).repeat(count, 1),
        "token_ids": tokenize([caption] * count, 1)[0],
        "is_dropped": torch.zeros(count, dtype=torch.bool),
        "strata": torch.stack([torch.arange(count), torch.full((count,), count)], dim=1),
    }


def losses(task, batch):
    return task(batch, SimpleNamespace()).loss


def gradients(task, *batches):
    """Return the gradients of the summed losses of micro-batches, by name; None where there is none."""
    task.zero_grad()
    for batch in batches:
        losses(task, batch).sum().backward()
    return {name: one.grad for name, one in task.named_parameters() if one.requires_grad}


# ------------------------------------------------------------------------------------------------------------- the loss


FLOW = ["task.noise.prediction_type=flow", "task.noise.zero_terminal_snr=false", "task.loss.weighting=none"]


def test_the_loss_of_flow_is_that_of_its_definition():
    words = ["task.timesteps.shift=3.0", "task.noise.offset=0.1", "task.noise.perturbation=0.2", "task.loss.kind=l1"]
    words += ["task.timesteps.range=[500,900]", "task.noise.multires_iterations=2"]
    task, batch = build(*FLOW, *words), make_batch()
    with torch.no_grad():
        latents, (prompts, pooled) = task._latents(batch), task._texts(batch)
        time = rng.uniform(batch["key"], (), TIMESTEP_DRAW)
        time = 0.5 + 0.4 * (3 * time / (1 + 2 * time))[:, None, None, None]
        noise = rng.normal(batch["key"], (4, 8, 8), NOISE_DRAW)
        noise += 0.1 * rng.normal(batch["key"], (4, 1, 1), OFFSET_DRAW)
        noise = add_coarse_noise(noise, batch["key"], 2, 0.3)
        conditions = {"text_embeds": pooled, "time_ids": batch["fit"].float()}
        added = noise + 0.2 * rng.normal(batch["key"], (4, 8, 8), PERTURBATION_DRAW)
        noisy, steps = (1 - time) * latents + time * added, 1000 * time.flatten()
        found = task.unet(noisy, steps, encoder_hidden_states=prompts, added_cond_kwargs=conditions).sample
        torch.testing.assert_close(losses(task, batch), (found - (noise - latents)).abs().mean(dim=(1, 2, 3)))


def test_flow_has_no_zero_terminal_snr():
    with refuses("task.noise.zero_terminal_snr: .*zero_terminal_snr=false"):
        build(*FLOW, "task.noise.zero_terminal_snr=true")


def test_micro_batches_have_the_losses_and_the_gradient_of_the_whole():
    task, batch = build("task.noise.multires_iterations=2"), make_batch()
    parts = [{name: column[place : place + 1] for name, column in batch.items()} for place in range(4)]
    torch.testing.assert_close(torch.cat([losses(task, part) for part in parts]), losses(task, batch))
    found, wanted = gradients(task, *parts), gradients(task, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalise, outside, inside", [(False, 0.25, 1.0), (True, 0.4, 1.6)])
def test_the_loss_counts_inside_the_mask_and_by_the_floor_outside(normalise, outside, inside):
    task, masked = build(), build(f"task.mask={{source: alpha, floor: 0.25, normalise: {normalise}}}".lower())
    mask, added = torch.ones(4, 1, 8, 8), torch.zeros(4, 4, 8, 8)
    mask[0, :, :, 4:], mask[1] = 0.0, 0.0
    task.predict = masked.predict = lambda noisy, *_: torch.zeros_like(noisy) + added

    def measure():
        return losses(task, make_batch()), losses(masked, make_batch() | {"mask": mask})

    plain, first = measure()
    torch.testing.assert_close(first[1:], plain[1:] * torch.tensor([1.0 if normalise else 0.25, 1.0, 1.0]))
    for column, factor in ((7, outside), (0, inside)):
        added[0, :, :, column] = 1000.0
        changed, found = measure()
        torch.testing.assert_close(found[0] - first[0], factor * (changed[0] - plain[0]), rtol=1e-3, atol=0)
        added.zero_()


WORDS = "task.preserve={weight: 0.5, prompt: [a dog]}"
OUTSIDE = "task.preserve={weight: 0.5, prompt: null}", "task.mask={source: alpha, floor: 0.0, normalise: false}"


@pytest.mark.parametrize("own, where", [([WORDS], slice(0, 8)), (OUTSIDE, slice(4, 8))])
def test_a_lora_is_held_to_what_its_base_predicts_for_the_class_or_outside_of_masks(own, where):
    """`error` is the loss without what is held."""
    task, base, passes = build(*own, "task.loss.weighting=none"), build(), []
    batch = make_batch() | {"mask": torch.ones(4, 1, 8, 8)}
    batch["mask"][..., 4:] = 0.0
    for parameter in task.adapter.parameters():
        parameter.data += 0.05
    predict = task.predict
    task.predict = lambda *inputs: passes.append((inputs, predict(*inputs))) or passes[-1][1]
    found = task(batch, SimpleNamespace())
    (inputs, switched_on), (_, switched_off) = passes[-2:]
    torch.testing.assert_close(switched_off, base.predict(*inputs))
    torch.testing.assert_close(inputs[2], base._texts(make_batch(caption="a dog" if own == [WORDS] else "a cat"))[0])
    moved = (switched_on - switched_off).square()[..., where].sum() / 256
    torch.testing.assert_close(found.loss.sum(), found.logs["error"][0] + 0.5 * moved)
    assert switched_on.requires_grad and not switched_off.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_caption_is_trained_as_if_no_other_were_longer(precision):
    task, long, near = build(), "a cat " * 60, {"rtol": 1e-2 if precision == "bf16" else 1e-5, "atol": 0}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        alone, wide = (losses(task, make_batch() | {"token_ids": tokenize(["a cat"] * 4, size)[0]}) for size in (1, 3))
        torch.testing.assert_close(alone, wide, **near)
        two, three = (losses(task, make_batch() | {"token_ids": tokenize([long] * 4, size)[0]}) for size in (2, 3))
        torch.testing.assert_close(two, three, **near)
        assert not torch.allclose(alone, two) and not torch.allclose(two, losses(task, make_batch(caption=long)))


def test_a_prompt_and_its_negative_of_other_lengths_change_nothing_by_their_padding():
    """Each is repeated to the common length, which attention does not see."""
    task = build()
    encoders = (task.text_encoder, task.text_encoder_2)
    prompts = (Prompt.model_construct(text="a cat", negative=negative) for negative in ("", "a dog " * 60))
    plain, padded = (encode_prompt(encoders, each, **task._config.encoding) for each in prompts)
    assert padded.prompt_embeds.shape == padded.negative_prompt_embeds.shape == (1, 154, 80)
    added = {"text_embeds": plain.pooled_prompt_embeds, "time_ids": torch.full((1, 6), 64.0)}
    one, two = (
        task.unet(torch.ones(1, 4, 8, 8), 500, embeds, added_cond_kwargs=added).sample
        for embeds in (plain.prompt_embeds, padded.prompt_embeds)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["zeros", "empty"])
def test_a_dropped_caption_is_zeros_or_the_empty_text(to):
    """The loader gives the empty text to what is dropped; zeros hide even another one."""
    task, cat, dog = build(f"task.captions.dropout_to={to}"), make_batch(), make_batch(caption="a dog")
    with torch.no_grad():  # of the U-Net alone, a LoRA begins without effect
        assert not torch.equal(losses(task, cat), losses(task, dog))
        dropped = torch.ones(4, dtype=torch.bool)
        hidden = torch.equal(losses(task, cat | {"is_dropped": dropped}), losses(task, dog | {"is_dropped": dropped}))
    assert hidden == (to == "zeros")


@pytest.fixture(scope="module")
def place(folder):
    """A folder with images, a run of a LoRA in `lora` and one of the U-Net and the text encoders in `whole`."""
    data = f"data.root={make_collection(folder / 'images')}"
    own = ["task.timesteps.sampling=stratified", "task.samples.prompts=[black,white]", *FIVES]
    run("finetune_sdxl", [*SHORT, *own, data, "run_dir=lora"], folder)
    run("finetune_sdxl", [*SHORT, "task.lora=null", "task.train_text_encoders=true", data, "run_dir=whole"], folder)
    return folder


def test_a_checkpoint_has_what_is_trained_alone(place):
    tensors = {run: checkpoint_tensors(place / run, 3) for run in ("lora", "whole")}
    weights = {run: [name for name in found if name.startswith("weights/")] for run, found in tensors.items()}
    assert weights["lora"] and all(re.search(r"/unet\..*\.lora_[AB]\.weight$", name) for name in weights["lora"])
    assert all(tensors["lora"][name].abs().max() > 0 for name in weights["lora"])
    assert {name.split("/")[1].split(".")[0] for name in weights["whole"]} == {"unet", *ENCODERS}


def test_a_run_logs_the_loss_by_timestep_and_the_pictures(place):
    """Stratified timesteps cover a step, so each fifth of them has samples."""
    train, evaluate = rows(place / "lora/metrics.jsonl", "train"), rows(place / "lora/metrics.jsonl", "evaluate")
    assert len(train) == 3 and all({f"error_{number}" for number in range(5)} <= row.keys() for row in train)
    assert all(0 < row["tone_0"] < 1 and 0 < row["tone_1"] < 1 for row in evaluate)
    shown = [np.array(Image.open(place / f"lora/plots/{name}.png")) for name in ("samples_before", "samples")]
    assert shown[0].shape == shown[1].shape and (shown[0] != shown[1]).any()  # of the base, and of the LoRA
    assert "tone_0" not in rows(place / "whole/metrics.jsonl")[-1]
    table = read_table(place / "lora/tables/samples.csv")
    assert [row["prompt"] for row in table] == ["black", "white"]
    assert all((place / "images" / row["nearest"]).is_file() and float(row["novelty"]) > 0 for row in table)


def test_a_copy_has_no_novelty_and_names_its_original():
    """The second image cannot be read, so it is no original."""
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(3)]
    paths = [text_field(name)["text"].values for name in ("a.png", "b.png", "c.png")]
    batch = {
        "images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        "weight": torch.tensor([1.0, 0.0, 1.0]),
        "text": torch.cat(paths),
        "text_offsets": torch.tensor([0, 5, 10, 15]),
    }
    third, second = find_nearest_images([images[2], images[1]], [batch])
    assert third == {"novelty": pytest.approx(0, abs=1e-3), "nearest": "c.png"}
    assert second["novelty"] > 0.5 and second["nearest"] != "b.png"
    assert find_nearest_images(images, []) == []


def test_the_loss_alone_chooses_the_best_weights():
    task = build()
    task.choose_best("loss")
    assert task.best_needs == 0
    with refuses("loop.best"):
        task.choose_best("tone_0")


# ----------------------------------------------------------------------------------------------------- exact resume


RESUMED = ["loop.total_steps=6", "loop.checkpoint_every_steps=3", "tracking.samples=true", "loop.ema_decay=0.9"]


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(place):
    """In three buckets of two areas, from latents and texts of caches."""
    own = [*SHORT, *RESUMED, "data.root=images", "task.latent_cache=latents", "task.text_cache=texts"]
    own += ["task.text_variants=2", "task.buckets.sizes_hw=[[[32,32]],[[64,64],[96,64]]]"]
    own += ["task.buckets.assign=all", "task.captions.emphasis=true"]
    own += ["task.captions.shuffle=true", "task.captions.tag_dropout=0.5"]
    own += ["task.mask={source: masks, floor: 0.1, normalise: true}"]
    own += ["task.lora.network_dropout=0.1", "task.lora.rank_dropout=0.1", "task.lora.module_dropout=0.1"]
    for number in range(4):
        image = Image.open(place / f"images/train/A/00{number}.png")
        (place / "masks/train/A").mkdir(parents=True, exist_ok=True)
        image.point(lambda level: 255 * (level < 128)).save(place / f"masks/train/A/00{number}.png")
    check_resumption("finetune_sdxl", own, place, killed_at=4, steps=6)
    assert samples_by_step(place / "straight") == samples_by_step(place / "killed")
    saved = read_json(place / "killed/checkpoints/step_00000006/state.json")["fingerprints"]
    assert {"frozen.unet", "frozen.vae"} <= saved.keys()  # a resume with others is refused
    text = (place / "killed/log.txt").read_text()
    for said in ("task.mask: 3 of 47 images", "3 buckets",
                 "47 images, each in several: 84 samples"):  # fmt: skip
        assert said in text


# -------------------------------------------------------------------------------------------------------- the pictures


def test_the_same_pictures_and_the_same_fixed_loss_for_the_same_seed():
    task = build("task.samples.prompts=[black,white]").eval()
    first = np.stack(task.sample())
    assert first.shape == (2, 64, 64, 3) and first.std() > 0
    assert (task.sample() == first).all()
    assert (build("task.samples.prompts=[black]").eval().sample()[0] == first[0]).all()
    assert (build("task.samples.prompts=[{text: black, seed: 1}]").eval().sample()[0] != first[0]).any()
    batch = make_batch() | {"sample_id": torch.arange(4)}
    reports = [task.evaluate({"val": [batch]}, step) for step in (0, 5)]
    assert reports[0].scalars == reports[1].scalars and {"loss", "error", "tone_1"} <= reports[0].scalars.keys()
    assert reports[0].images["samples"].shape == (64, 128, 3)
    mixed = build("task.samples.prompts=[black,{text: white, image_size_hw: [96,64]}]").eval().draw().images["samples"]
    assert mixed.shape == (96, 128, 3) and (mixed[64:, :64] == 255).all()


def test_offloaded_networks_are_used_during_visits_alone(monkeypatch):
    """Outside of visits their weights are doubled here, where a GPU would find them on the host."""
    task, batch = build("task.samples.prompts=[a cat]"), make_batch()
    wanted = losses(task, batch), task.sample()[0]
    decoded = decode_latents(task.vae, torch.ones(1, 4, 8, 8))
    networks = networks_of(task, task.offloaded).values()

    def scale(networks, factor):
        for parameter in torch.nn.ModuleList(networks).parameters():
            parameter.data *= factor

    @contextmanager
    def visiting(device, *visitors):
        scale(visitors, 0.5)
        yield
        scale(visitors, 2.0)

    monkeypatch.setattr("sdxl.task.visiting", visiting)
    scale(networks, 2.0)
    assert not torch.equal(decode_latents(task.vae, torch.ones(1, 4, 8, 8)), decoded)
    assert set(task.offloaded) == {"vae", *ENCODERS}
    assert torch.equal(losses(task, batch), wanted[0]) and np.array_equal(task.sample()[0], wanted[1])
    learns = "task.lora.targets=[unet.*.to_q,text_encoder*.q_proj]"
    assert build(learns).offloaded == ("vae",)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_a_lora_learns_on_a_base_in_int8_near_the_float32_one(kind):
    """The error of the tiny U-Net's output is 1.6 % in int8 and 1.2 % in bfloat16; its weights take half the bytes."""
    base, task, batch = build(), build(f"model.frozen_dtype={kind}"), make_batch()
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = (latents, torch.tensor([10, 300, 600, 999]), *base._texts(batch), batch["fit"].float())
    found, wanted = (each.predict(*inputs).detach() for each in (task, base))
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.02
    sizes = [sum(parameter.nbytes for parameter in each.unet.parameters()) for each in (task, base)]
    assert sizes[0] / sizes[1] < (0.28 if kind == "int8" else 0.51)
    found, wanted = (torch.cat([one.flatten() for one in gradients(each, batch).values()]) for each in (task, base))
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.97
