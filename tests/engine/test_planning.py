"""The plan of `train.py loop.minutes`: rules over measurements, kept by the run, never against a word of a command."""

from dataclasses import replace
from itertools import product, starmap
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

from bench import plans
from engine.likeness import compare_mirrored, tells_colour
from engine.recipe import measurements
from engine.recipe import rules as planning
from engine.recipe.measurements import Measurements, Network
from engine.recipe.rules import choose_network, choose_px, epochs_of
from engine.run import pace
from engine.run.loop import Run
from models.config import timm_config
from models.weights import offers
from tests.in_process import configure, make_images, run
from tests.test_weights_commands import RESNET, fill_cache
from utils.config.help import ROOT
from utils.hardware import choose_precision
from utils.io.files import read_json
from utils.ranks import distributed
from utils.record.run_reader import RunReader

FACTS = Measurements(
    images=1000, validation=100, side_px=100, most_px=224, has_classes=True, mirrors=1.0, border=255, colours=True,
    grey=False, reference=1e5, step_sec=1e-5, bf16=True, machine=offers.NETWORKS["machines"]["cpu"],
)  # fmt: skip


CONVNEXT = "test_convnext3.r160_in1k"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command of train.py on a machine where a few steps fit into its minutes."""
    monkeypatch.setattr(measurements, "time_network", lambda *_, **__: 0.002)
    monkeypatch.setattr(measurements, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(pace, "monotonic", lambda: pace.STARTED + 60)
    root = make_images(tmp_path / "images")
    return [
        f"data.root={root}", f"run_dir={tmp_path / 'run'}", "loop.minutes=1", "loop.batch_size=4",
        "augment.image_size_hw=[32,32]", "augment.rand_augment=rand-m9-n1", "runtime.device=cpu", "runtime.threads=1",
    ]  # fmt: skip


def test_a_plan_keeps_what_the_command_sets_and_a_resumed_run_its_plan(words, tmp_path, monkeypatch):
    run("train", words, tmp_path)
    config = RunReader(tmp_path / "run").config
    assert (config["optim"]["opt"], config["optim"]["lr"], config["lr_finder"]["enabled"]) == ("muon", 0.02, "auto")
    assert config["augment"]["image_size_hw"] == [32, 32]  # as set
    assert not config["augment"]["on_device"]  # as the policy is set
    kept = read_json(tmp_path / "run/minutes.json")["words"]
    assert "optim=muon" in kept and not any("image_size_hw" in word for word in kept)
    monkeypatch.setattr(planning, "measure", None)  # it is not planned again
    run("train", words, tmp_path)
    assert RunReader(tmp_path / "run").config == config


def chosen(facts, key):
    return [word for rule in planning.list_rules(facts) for word in rule.words.split() if word.startswith(f"{key}=")]


def test_a_plan_takes_timms_weights_that_tell_the_classes_unless_the_command_has_its_own(words, tmp_path, monkeypatch):
    fill_cache(monkeypatch, tmp_path, RESNET, timm.create_model("test_resnet"))
    fill_cache(monkeypatch, tmp_path, CONVNEXT, timm.create_model("test_convnext3"))
    monkeypatch.setattr(measurements, "_LEAST_FINE", 1)
    monkeypatch.setattr(Run, "fit", lambda *_: None)
    fetched = []
    monkeypatch.setattr(offers, "_fetch", lambda name, row, seconds: fetched.append((name, round(seconds))))
    # Regressions on features err rarely, least often on those of the ResNet, for which there is no time. On pictures
    # they err often. In float32 a network trains in half the time.
    right = {3 * 16 * 16: 0.3, 128: 0.8}  # of small pictures, of the ConvNeXt
    monkeypatch.setattr(measurements, "count_right", lambda flat, labels: len(labels) * right.get(flat.shape[1], 0.9))
    seconds = {"bf16": 0.002, "fp32": 0.001, RESNET: 100.0}
    monkeypatch.setattr(
        measurements, "time_network", lambda *given, **_: seconds.get(given[0].name) or seconds[given[3].precision]
    )
    words = [*words[:4], "augment.image_size_hw=[64,64]", *words[-2:]]
    run("train", words, tmp_path)
    config = RunReader(tmp_path / "run").config
    assert (config["init_from"], config["model"]["name"], config["task"]["head"]) == ("timm", CONVNEXT, "refitted")
    assert (config["optim"]["name"], config["schedule"]["name"]) == ("adamw", "cosine")
    machine = config["runtime"]["precision"], config["runtime"]["channels_last"]
    assert machine == (("fp32", True) if choose_precision("auto", "cpu") == "bf16" else ("auto", "auto"))
    assert config["augment"]["std"] == list(timm.get_pretrained_cfg(CONVNEXT).std)
    assert config["augment"]["eval_crop"] == 1.0
    for number, word in enumerate(("init_from=null", "model=resnet18", "model.pretrained=never")):
        run("train", [*words, word, f"run_dir=other{number}"], tmp_path)
        assert RunReader(tmp_path / f"other{number}").config["init_from"] is None
    # A busy machine reads too few images to see how much better the features are.
    seconds |= {"bf16": 200.0, "fp32": 100.0}
    right[128] = 0.35
    monkeypatch.setattr(measurements, "_PROBE_SHARE", 0.0)
    run("train", [*words, "model.pretrained=cached", "run_dir=cached"], tmp_path)
    config = RunReader(tmp_path / "cached").config
    assert (config["model"]["name"], config["loop"]["count"]) == (CONVNEXT, 256)  # its head alone
    monkeypatch.setattr(measurements, "compare_mirrored", lambda small, labels: 0.3)
    for image in (tmp_path / "images").rglob("*.png"):  # letters
        Image.open(image).convert("L").save(image)
    run("train", [*words, "run_dir=letters"], tmp_path)
    assert RunReader(tmp_path / "letters").config["init_from"] is None
    assert fetched == [("convnext_nano.in12k_ft_in1k", 6)]  # a tenth of the minute; no CPU has timed a larger one


def test_a_tagger_is_planned_without_rules_that_need_classes(words, tmp_path, monkeypatch):
    """Its images are larger than twice the largest that it may train on, and so reduced when they are decoded."""
    monkeypatch.setitem(offers.NETWORKS["machines"]["cpu"], "most_px", 64)
    for image in (tmp_path / "images").rglob("*.png"):
        image.with_suffix(".txt").write_text(f"{image.parent.name.lower()}_tag, all")
        Image.open(image).resize((200, 200)).save(image)
    words = [word for word in words if not word.startswith("augment.")]
    run("train", [*words, "task=tagging", "task.min_count=1", "augment.image_size_hw=[64,64]"], tmp_path)
    config = RunReader(tmp_path / "run").config
    augment = config["augment"]
    assert config["model"]["name"] == "resnet10t" and augment["shrink"]
    assert augment["pad"] == "square" and not augment["horizontal_flip"]


def test_a_network_of_the_command_counts_by_its_own_cost():
    own = replace(FACTS, networks=[Network({"name": "resnet50"}, 10.0)])
    assert choose_network(own).row["name"] == "resnet50" and epochs_of(own) == pytest.approx(
        10 / (choose_px(own) / 64) ** 2
    )
    weights = Network({"name": "resnet50"}, 5.0, is_pretrained=True)
    drawings = [replace(FACTS, networks=[weights], reference=10.0**power) for power in range(3, 8)]
    sides = [choose_px(each) for each in drawings]
    assert sides == sorted(sides) and sides[0] == 96 and choose_network(drawings[0]) == weights
    config, _ = configure("train", ["data.root=x", "loop.minutes=2"])
    said = [(planning.describe_plan(config, each).split(", ")[-1], chosen(each, "optim.lr")) for each in drawings[::4]]
    assert said == [("a fitted head alone", ["optim.lr=0.0002"]), ("221.2 epochs", ["optim.lr=0.0008"])]


@pytest.mark.parametrize("reference, images, width", [(1e3, 1000, 16), (1e5, 1000, 32), (4e5, 50, 48)])
def test_more_time_gives_a_cpu_a_wider_network(reference, images, width):
    known = replace(FACTS, reference=reference, images=images)
    assert (choose_px(known), choose_network(known).row["channels"][0]) == (64, width)


def test_docs_have_the_plans_of_gpus():
    text = (ROOT / "docs/gpu.md").read_text("utf-8")
    assert [row for row in starmap(plans.show, product(*plans.CASES)) if row not in text] == []


def test_a_large_network_is_tuned_as_published_and_a_vit_is_built_for_its_images(monkeypatch):
    monkeypatch.setenv(distributed.RANKS_VARIABLE, "8")
    name = "vit_large_patch14_reg4_dinov2.lvd142m"
    weights = Network({"name": name} | offers.NETWORKS["weights"][name], 100.0, is_pretrained=True)
    known = replace(FACTS, most_px=448, side_px=500, reference=1e8, networks=[weights], machine=plans.GPU)
    words = " ".join(rule.words for rule in planning.list_rules(known)).split()
    size = "image_size_hw=[336,336]"  # a multiple of the patch, with which 32,000 images are seen
    stated = {f"model.{size}", f"augment.{size}", "loop.batch_size=256", "optim.lr=0.0002", "optim.layer_decay=0.75"}
    assert stated < {*words}


def test_a_network_is_timed_without_a_search_for_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(measurements, "time_update", lambda *_: torch.backends.cudnn.benchmark)
    runtime = SimpleNamespace(device="cpu", channels_last=False)
    assert measurements.time_network(timm_config("test_resnet"), 32, 2, runtime) == 0 < torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    "name, timed",
    [
        ("resnet34d", {160: 4e-4}),
        ("resnet50d", {160: 6e-4, 192: 6e-4}),
        ("test_vit", {224: 3e-3, 336: 3e-3}),
    ],
)
def test_a_gpu_times_networks_at_two_sides_and_takes_what_the_time_pays_for(name, timed, monkeypatch):
    """Others are slow on it. Larger images may cost no more than smaller ones, or more memory than there is."""

    def time_network(config, side, *_, **__):
        if side > max(timed):
            raise torch.OutOfMemoryError
        return timed[side] if config.name == name else side

    known = replace(FACTS, side_px=500, most_px=448, images=20_000, reference=8e7, machine=plans.GPU)
    if name == "test_vit":
        known = replace(
            known, networks=[Network({"name": name, "step_px": 112, "at_once": 1}, 100.0, is_pretrained=True)]
        )
    monkeypatch.setattr(measurements, "time_network", time_network)
    measurements.time_once.cache_clear()
    found = planning.time_candidates(known, None)
    assert (choose_network(found).row["name"], choose_px(found)) == (name, max(timed))


def test_all_loader_workers_are_timed_with_the_policy(monkeypatch):
    augment = configure("train", ["data.root=x"])[0].augment
    monkeypatch.setattr(measurements, "timeit", lambda view, number: number * view().shape[-1])  # 64 s for 64 px
    assert [measurements.time_policy(augment, 100, workers) for workers in (0, 1, 16)] == [0, 64, 4]


LONG = {"mirrors": 0.3, "reference": 4e5}  # of letters
LETTERS = "augment.fill task.mixup_alpha augment.random_erasing"
RULES = [
    ({}, "augment.rand_augment"),
    ({"side_px": 600}, "augment.rand_augment augment.shrink"),
    ({"policy": 50.0}, ""),  # a GPU would wait for its workers
    ({"images": 10**4}, ""),
    ({"images": 50}, "task.cutmix_alpha"),
    ({"mirrors": 0.3}, "augment.fill"),
    (LONG, LETTERS),
    ({"mirrors": 0.7, "images": 12_000, "reference": 4e5}, ""),
    ({"colours": False}, "augment.color_jitter"),
    ({"colours": False, "images": 10**5}, ""),  # few epochs
    ({"detail": True}, "augment.rand_augment augment.pad"),
    ({"grey": True}, "augment.rand_augment model.in_channels"),
    ({"grey": True, "networks": [Network({"name": "resnet50"}, 1.0, is_pretrained=True)]}, ""),
    ({"grey": True, "has_classes": False}, "augment.rand_augment"),
]
KEYS = {key for _, keys in RULES for key in keys.split()}


@pytest.mark.parametrize("changes, keys", RULES)
def test_the_rules_for_facts(changes, keys):
    known = replace(FACTS, **changes)
    assert {key for key in KEYS if chosen(known, key)} == {*keys.split()}
    assert bool(chosen(known, "augment.on_device")) != ("augment.rand_augment" in keys)


@pytest.mark.parametrize("changes", [{"colours": False}, {"detail": True, "side_px": 600}, LONG | {"grey": True}])
def test_the_words_of_rules_are_a_configuration(changes):
    words = [word for rule in planning.list_rules(replace(FACTS, **changes)) for word in rule.words.split()]
    configure("train", ["data.root=x", *words])


def test_fine_detail_takes_the_time_of_many_epochs():
    few = replace(FACTS, images=40, side_px=512, most_px=512)
    assert (
        choose_px(few) < choose_px(replace(few, detail=True))
        and choose_px(replace(few, detail=True, images=10**5)) == 64
    )


@pytest.mark.parametrize("mirrors", [True, False])
def test_mirroring_is_judged_by_the_images(mirrors):
    draws, labels = torch.Generator().manual_seed(0), torch.arange(60) % 2
    images = torch.randint(0, 60, (60, 3, 20, 24), generator=draws, dtype=torch.uint8)
    for image, label in zip(images, labels):
        part = image[:, :10] if mirrors else image[:, :, :12]  # the upper half, or the left half
        (part if label == 0 else image[:, 10:] if mirrors else image[:, :, 12:]).add_(150)
    assert (compare_mirrored(images.float(), labels) >= measurements.MIRRORS) is mirrors


def test_colours_that_tell_nothing_are_changed():
    images = (torch.arange(300.0) % 250)[:, None, None, None].expand(-1, 3, 4, 4)
    random, bright = (
        torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0)),
        torch.arange(300) % 250 // 50,
    )
    assert tells_colour(images, bright) and not tells_colour(images, random)
    assert tells_colour(images[:50], random[:50])  # too few to tell
    assert chosen(replace(FACTS, mirrors=0.3), "augment.fill") == ["augment.fill=255"]
