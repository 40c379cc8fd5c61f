"""The published recipes of conf/experiment/, to the letter: what each derives for ImageNet is compared with a table.

The tables hold what the ConvNeXt V2 paper (arXiv 2301.00808, appendix A) and facebookresearch/ConvNeXt-V2:TRAINING.md
state, multiplied out by hand; the files hold what they state. Nothing here needs ImageNet: an epoch is its number of
images, and networks are built on the meta device.
"""

import re
from functools import cache
from types import SimpleNamespace

import pytest

from engine.plan import plan_streams
from engine.run.start import build_task
from engine.tasks.kind import Setup, open_kind
from models.fcmae import count_removed
from optim.groups import build_groups
from optim.schedules import Schedule, ema_decay_at
from tests.conf.test_compose import FOLDERS, script_of
from tests.in_process import configure
from utils.config.help import CONF

EXPERIMENTS = CONF / "experiment"
IMAGENET, IMAGENET_22K, SMALL = 1_281_167, 14_197_122, 10_000  # images
CLASSES = {IMAGENET: 1000, IMAGENET_22K: 21_841, SMALL: 10}

# Rate scales of stem, a middle block, last block and head: by layer, of 12 (atto to pico), 14 (nano) or 18 (tiny), or
# in twelve groups (base, large and huge).
SCALES = {"single_12": (12, 5, 1, 0), "single_14": (14, 6, 1, 0), "single_18": (18, 8, 1, 0), "group": (13, 6, 1, 0)}
# What the recipes of fine-tuning come to. The last three: decay of the average, side of images, images of an epoch.
FINETUNE = """
recipe                         lr     steps   warmup layers    decay weight drop mix cut smooth ema    side length
imagenet/finetune_atto         8e-4   750_684 0      single_12 0.9   0.3    0.1  0.0 0.0 0.2    0.9999 224  1_281_167
imagenet/finetune_femto        8e-4   750_684 0      single_12 0.9   0.05   0.0  0.3 0.3 0.2    0.9999 224  1_281_167
imagenet/finetune_pico         8e-4   750_684 0      single_12 0.9   0.3    0.0  0.3 0.3 0.2    0.9999 224  1_281_167
imagenet/finetune_nano         8e-4   750_684 0      single_14 0.9   0.3    0.1  0.5 0.5 0.2    0.9999 224  1_281_167
imagenet/finetune_tiny         3.2e-3 375_342 50_046 single_18 0.9   0.05   0.2  0.8 1.0 0.1    0.9999 224  1_281_167
imagenet/finetune_base         2.5e-3 125_114 25_023 group     0.6   0.05   0.1  0.8 1.0 0.1    0.9999 224  1_281_167
imagenet/finetune_large        2.5e-3 125_114 25_023 group     0.6   0.05   0.2  0.8 1.0 0.1    0.9999 224  1_281_167
imagenet/finetune_huge         5e-3   62_557  12_511 group     0.75  0.05   0.3  0.8 1.0 0.1    0.9999 224  1_281_167
imagenet22k/finetune_nano_224  5e-5   225_206 0      single_14 0.9   1e-8   0.1  0.0 0.0 0.1    0.9999 224  1_281_167
imagenet22k/finetune_nano_384  5e-5   225_206 0      single_14 0.9   1e-8   0.1  0.0 0.0 0.1    0.9999 384  1_281_167
imagenet22k/finetune_tiny_224  5e-5   225_206 0      single_18 0.9   1e-8   0.1  0.0 0.0 0.1    0.9999 224  1_281_167
imagenet22k/finetune_tiny_384  5e-5   225_206 0      single_18 0.9   1e-8   0.1  0.0 0.0 0.1    0.9999 384  1_281_167
imagenet22k/finetune_base_224  5e-5   75_069  0      group     0.8   1e-8   0.2  0.0 0.0 0.1    0.9999 224  1_281_167
imagenet22k/finetune_base_384  5e-5   75_069  0      group     0.8   1e-8   0.2  0.0 0.0 0.1    0.9999 384  1_281_167
imagenet22k/finetune_large_224 5e-5   75_069  0      group     0.8   1e-8   0.3  0.0 0.0 0.1    0.9999 224  1_281_167
imagenet22k/finetune_large_384 5e-5   75_069  0      group     0.8   1e-8   0.3  0.0 0.0 0.1    0.9999 384  1_281_167
imagenet22k/finetune_huge_384  5e-5   75_069  0      group     0.85  1e-8   0.5  0.0 0.0 0.1    none   384  1_281_167
imagenet22k/finetune_huge_512  5e-5   75_069  0      group     0.85  1e-8   0.5  0.0 0.0 0.1    none   512  1_281_167
imagenet22k/intermediate_nano  4e-3   311_949 17_330 single_14 0.9   0.05   0.0  0.8 1.0 0.1    none   224  14_197_122
imagenet22k/intermediate_tiny  4e-3   311_949 17_330 single_18 0.9   0.05   0.0  0.8 1.0 0.1    none   224  14_197_122
imagenet22k/intermediate_base  4e-3   311_949 17_330 group     0.8   0.05   0.1  0.8 1.0 0.1    none   224  14_197_122
imagenet22k/intermediate_large 4e-3   311_949 17_330 group     0.8   0.05   0.1  0.8 1.0 0.1    none   224  14_197_122
imagenet22k/intermediate_huge  4e-3   311_949 17_330 group     0.8   0.05   0.3  0.8 1.0 0.1    none   224  14_197_122
small_data/finetune            8e-4   15_625  1_562  single_18 0.9   0.05   0.1  0.0 0.0 0.1    0.998  224  10_000
"""  # the last one is ours, for 10,000 images
NAMES, *LINES = (line.split() for line in FINETUNE.strip().splitlines())
FINETUNE = {line[0]: SimpleNamespace(**dict(zip(NAMES, line))) for line in LINES}
SIZES = ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
# Rate, steps, warm-up steps, images of an epoch.
PRETRAIN = {f"imagenet/pretrain_{size}": (2.4e-3, 500_456, 12_511, IMAGENET) for size in SIZES}
PRETRAIN |= {"small_data/pretrain": (6e-4, 20_000, 1000, SMALL)}

# What has weight decay: kernels and matrices, and no bias, norm, GRN or mask token.
DECAYED = re.compile(
    r"(encoder\.)?(downsample_layers\.(0\.0|[123]\.1)|(stages\.\d|decoder)\.\d+\.(dwconv|pwconv[12])|head|proj|pred)\.weight"
)


@cache
def derive(name, epoch_length):
    """The configuration of a recipe, its task on the meta device, its plan on 8 ranks, and its parameter groups."""
    config, _ = configure(script_of(name), [f"experiment={name}", "data.root=PATH", "dry_run=true"])
    names = [f"class{number:05}" for number in range(CLASSES[epoch_length])]
    facts = {"class_names": names} if script_of(name) == "finetune" else {}
    setup = Setup(config.model, config.task, config.augment.preprocessing(3), facts)
    task = build_task(lambda: open_kind(config.task.name).build(setup), config)
    assert all(parameter.is_meta for parameter in task.parameters())
    train = SimpleNamespace(epoch_length=epoch_length, chunk=None)
    plan = plan_streams(config, SimpleNamespace(train=train, evaluation={}), 8)
    groups = build_groups(task, {"network": task.network}, config.optim)
    return SimpleNamespace(config=config, task=task, plan=plan, groups=groups)


def group_of(made, name):
    (found,) = (group for group in made.groups if f"network.{name}" in group["names"])
    return found


def check_decay(made, weight_decay, betas):
    optim = made.config.optim
    assert (optim.name, optim.betas) == ("adamw", betas)
    decays = {
        name.removeprefix("network."): optim.weight_decay if group["fixed_decay"] is None else group["fixed_decay"]
        for group in made.groups
        for name in group["names"]
    }
    assert decays == {name: weight_decay if DECAYED.fullmatch(name) else 0.0 for name in decays}
    assert len(decays) == len(list(made.task.parameters()))


def check_schedule(made, lr, steps, warmup_steps, min_lr):
    config, plan = made.config, made.plan
    assert (plan.lr, plan.total_steps, plan.warmup_steps) == (pytest.approx(lr, rel=1e-9), steps, warmup_steps)
    assert config.schedule.name == "cosine"
    schedule = Schedule(config.schedule, plan.lr, config.optim.weight_decay, steps, warmup_steps)
    assert schedule.at(warmup_steps).lr == pytest.approx(lr, rel=1e-9)
    assert schedule.at(steps).lr == pytest.approx(min_lr, abs=1e-15)
    if warmup_steps:
        assert schedule.at(0).lr == pytest.approx(lr / warmup_steps, rel=1e-9)


def test_no_recipe_is_passed_over():
    files = {path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for folder in FOLDERS
             for path in (EXPERIMENTS / folder).rglob("*.yaml")}  # fmt: skip
    assert files == {*FINETUNE, *PRETRAIN}


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_to_the_letter(name):
    row = FINETUNE[name]
    made = derive(name, int(row.length))
    config, plan = made.config, made.plan
    network, ours = made.task.network, name.startswith("small_data")

    check_schedule(made, float(row.lr), int(row.steps), int(row.warmup), 1e-6)
    batches = {"imagenet/": 1024, "imagenet22k/intermediate": 4096, "imagenet22k/finetune": 512, "small_data/": 64}
    assert [plan.batch_size] == [batch for prefix, batch in batches.items() if name.startswith(prefix)]
    assert plan.micro_batch_size == 32 or not name.startswith("imagenet/")
    assert ours or config.loop.clip_grad_norm is None

    blocks, last = network.depths[2], network.depths[3] - 1
    middle = {6: 3, 8: 4, 9: 4, 27: 13}[blocks]
    places = ("downsample_layers.0.0", f"stages.2.{middle}.dwconv", f"stages.3.{last}.pwconv2", "head")
    scales = [group_of(made, f"{place}.weight")["lr_scale"] for place in places]
    assert scales == pytest.approx([float(row.decay) ** power for power in SCALES[row.layers]], rel=1e-12)
    assert group_of(made, "norm.weight")["lr_scale"] == 1.0

    check_decay(made, float(row.weight), [0.9, 0.999])
    rates = [block.drop_path.rate for stage in network.stages for block in stage]
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(float(row.drop))) and rates == sorted(rates)
    assert network.head.out_features == CLASSES[int(row.length)] and config.model.head_init_scale == 0.001

    task = config.task
    assert [task.mixup_alpha, task.cutmix_alpha, task.label_smoothing] == [
        float(text) for text in (row.mix, row.cut, row.smooth)
    ]
    assert task.mix_probability == 1.0 and task.head == ("fitted" if ours else "random")

    augment = config.augment
    assert (augment.rand_augment, augment.interpolation) == ("rand-m9-mstd0.5-inc1", "bicubic")
    assert augment.random_erasing == 0.25
    side = int(row.side)
    assert augment.image_size_hw == [side, side]
    assert augment.eval_resize == ("squash" if side >= 384 else "crop") and augment.eval_crop == 0.875
    assert (augment.crop_scale, augment.horizontal_flip) == ([0.35 if ours else 0.08, 1.0], 0.5)

    ema = None if row.ema == "none" else float(row.ema)
    assert (config.loop.ema_decay, config.loop.ema_warmup) == (ema, ours or ema is None)
    if ema is not None and not ours:
        assert ema_decay_at(0, ema, warmup=config.loop.ema_warmup) == 0.9999


# ---------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_to_the_letter(name):
    lr, steps, warmup_steps, epoch_length = PRETRAIN[name]
    made = derive(name, epoch_length)
    config, ours = made.config, name.startswith("small_data")

    check_schedule(made, lr, steps, warmup_steps, 0.0)
    assert made.plan.batch_size == (256 if ours else 4096) and made.plan.micro_batch_size == (32 if ours else 64)
    assert config.loop.ema_decay is None and (ours or config.loop.clip_grad_norm is None)
    assert {entry["lr_scale"] for entry in made.groups} == {1.0}

    check_decay(made, 0.05, [0.9, 0.95])
    network, task, augment = made.task.network, config.task, config.augment
    assert (count_removed(49, network.mask_ratio), network.patch_px, network.pred.out_channels) == (30, 32, 3072)
    assert (task.mask_ratio, task.decoder_dim, task.decoder_depth) == (0.6, 512, 1)
    assert {block.drop_path.rate for stage in network.encoder.stages for block in stage} == {0.0}
    assert (augment.image_size_hw, augment.crop_scale, augment.horizontal_flip) == ([224, 224], [0.2, 1.0], 0.5)
    assert (augment.interpolation, augment.rand_augment, augment.random_erasing) == ("bicubic", None, 0.0)
