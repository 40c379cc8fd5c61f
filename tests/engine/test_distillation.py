"""Distillation: the losses by hand, the teacher's view, and whole runs whose teacher is a tiny tagger or classifier."""

import json
import re

import pytest
import torch
from torch.nn import functional as F

from bench.measure import read_group
from engine.exports.weights import open_weights
from engine.tasks.config import DistillationTaskConfig
from engine.tasks.distillation import find_teacher
from engine.tasks.kind import Setup
from engine.tasks.opening import open_kind
from models.config import TimmConfig
from models.image_model import Normalise, find_head
from tests.engine.test_checkpoint import replace_state
from tests.engine.test_tagging import RUN as TAGGER
from tests.engine.test_tagging import VOCABULARY, make_tags
from tests.engine.test_tasks import MODEL, PREPROCESSING
from tests.in_process import SHORT, SMALL_MODEL, check_resumption, make_images, run
from tests.support import checkpoint_tensors, refuses, rows, write_manifest
from utils.io.files import read_json
from utils.io.weights import read_weights

DISTIL = [
    *SMALL_MODEL, *SHORT, "model.dims=[6,12]", "task=distillation", "task.rating_s=general", "data=image_folder",
    "data.root=images", "model.head_init_scale=1.0", "augment.image_size_hw=[32,32]",
]  # fmt: skip
CONFIG = read_group(DistillationTaskConfig, "task", "distillation", teacher="teacher", temperature=2.0)


# --- a batch


def make(names, outputs=8, teacher=None, size=(16, 16), **changes):
    torch.manual_seed(0)
    model = MODEL.model_copy(update={"dims": [8, 16]}) if teacher is None else teacher
    stated = {"image_size_hw": list(size), "mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.5]}
    facts = {"teacher": {"model": model.model_dump(), "preprocessing": stated, "outputs": outputs}}
    return open_kind("distillation").build(
        Setup(MODEL, CONFIG.model_copy(update=changes), PREPROCESSING, facts | names)
    )


def look(task, batch, size):
    """The teacher's logits, and the student's logits and features, by other paths."""
    pixels = batch["images"] / 255
    seen = F.interpolate(Normalise([0.3, 0.4, 0.5], [0.2, 0.25, 0.5], 3)(pixels), size, mode="bicubic", antialias=True)
    network = task.student.network
    pooled = network.norm(network.forward_features(task.student.normalise(pixels)).mean((-2, -1)))
    return [found.detach().double() for found in (task.teacher(seen), network.head(pooled), pooled)]


def loss_of_tags(soft, logits):
    return -(soft.sigmoid() * F.logsigmoid(logits) + (-soft).sigmoid() * F.logsigmoid(-logits)).sum(1)


def loss_of_classes(soft, logits):
    return (soft.softmax(1) * (soft.log_softmax(1) - logits.log_softmax(1))).sum(1)


@pytest.mark.parametrize(
    ("names", "formula"), [(VOCABULARY.facts(), loss_of_tags), ({"class_names": list("abcdefgh")}, loss_of_classes)]
)
def test_the_loss_of_logits_is_the_formula_at_a_temperature(names, formula):
    task, batch = make(names).train(), make_tags()
    output = task(batch, 0.0)
    taught, logits, _ = look(task, batch, (16, 16))
    expected = 4 * formula(taught / 2, logits / 2)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert not hasattr(task, "projection") and (expected > 0).all()
    output.loss.sum().backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters()) and not task.teacher.training
    assert all(parameter.grad is not None for parameter in task.student.parameters())


@pytest.mark.parametrize(("name", "size"), [(None, (16, 16)), ("test_vit", (64, 64)), ("test_convnext", (64, 64))])
def test_the_loss_of_features_is_that_of_the_formula(name, size):
    """Features are what the head of the teacher, ours or timm's, reads."""
    teacher = name and TimmConfig(family="timm", name=name, in_channels=3, drop_path_rate=None)
    task, batch = make({}, outputs=7, teacher=teacher, size=size, targets="features").train(), make_tags()
    output, given = task(batch, 0.0), []
    find_head(task.teacher).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].double()))
    features = look(task, batch, size)[2]
    white = (given[0] - given[0].mean(1, keepdim=True)) / (given[0].var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    gap = (task.projection(features.float()).double() - white).abs()
    smooth = torch.where(gap < 2, gap**2 / 4, gap - 1).mean(1)
    torch.testing.assert_close(output.loss.double(), smooth, rtol=1e-4, atol=1e-4)
    output.loss.sum().backward()
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.projection.parameters())


# --- runs


def distil(place, *words):
    run("finetune", [*DISTIL, *words], place)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tagged and with bare images, and the runs of a tagger and a classifier."""
    folder = tmp_path_factory.mktemp("distillation")
    for name in ("images", "bare"):
        make_images(folder / name)
    for file in (folder / "images").rglob("*.txt"):
        file.write_text({"A": "square, rating:s", "B": "disc, round"}[file.parent.name])
    for file in (folder / "bare").rglob("*.txt"):
        file.unlink()
    steps = ["loop.total_steps=20", "loop.checkpoint_every_steps=20", "loop.evaluate_every_epochs=5", "optim.lr=0.01"]
    run("finetune", [*TAGGER, *steps, "run_dir=teacher"], folder)
    run("finetune", [*SMALL_MODEL, *SHORT, "data=image_folder", "augment=glyphs", "data.root=images",
                     "run_dir=classifier"], folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def features(place):
    """The run of a student of features."""
    distil(place, "task.teacher=teacher", "task.targets=features", "run_dir=features")
    return place / "features"


def test_a_student_of_a_tagger_learns_from_bare_images_and_becomes_a_tagger(place):
    steps = ["loop.total_steps=30", "loop.checkpoint_every_steps=30", "loop.evaluate_every_epochs=15", "optim.lr=0.01"]
    distil(place, *steps, "task.teacher=teacher", "data.root=bare", "run_dir=student")
    losses = [row["loss"] for row in rows(place / "student/metrics.jsonl", "train")]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.2  # its least is the teacher's entropy

    names = {name for name in checkpoint_tensors(place / "student", 30) if name.startswith(("weights/", "task/"))}
    assert not any("teacher" in name for name in names)
    assert "weights/head.weight" in names

    path = place / "student/weights/best_weights.safetensors"
    metadata, teachers = (read_weights(place / name / "weights/best_weights.safetensors")[1]
                          for name in ("student", "teacher"))  # fmt: skip
    rebuilt = open_weights(path)
    assert rebuilt.kind.output == "tags" and metadata["task"]["name"] == "tagging" and "teacher" not in metadata
    assert metadata["tag_names"] == teachers["tag_names"]
    assert metadata["frozen"].keys() == {"teacher"}
    (place / "teacher").rename(place / "moved")  # it is needed no more
    try:
        run("evaluate", ["weights=student/weights/best_weights.safetensors", "data=image_folder", "data.root=images",
                         "runtime.device=cpu", "runtime.threads=1", "output=mine"], place)  # fmt: skip
        assert "mAP" in read_json(place / "mine/metrics.json")
        run("export", ["run_dir=student", "format=safetensors"], place)
    finally:
        (place / "moved").rename(place / "teacher")


def test_a_run_resumes_bit_for_bit(place):
    settings = [*DISTIL, "loop.total_steps=6", "task.teacher=teacher/weights/last_weights.safetensors"]
    settings.append("task.cutmix_alpha=1.0")
    check_resumption("finetune", settings, place, killed_at=3, steps=6)
    checkpoint = place / "killed/checkpoints/step_00000006"
    state, metadata = read_json(checkpoint / "state.json"), read_weights(checkpoint / "weights.safetensors")[1]
    assert state["fingerprints"]["frozen.teacher"] == metadata["frozen"]["teacher"]
    state["fingerprints"]["frozen.teacher"] = "another"
    replace_state(checkpoint, json.dumps(state))
    with refuses(r"^resume: .*\n  frozen\.teacher: "):
        run("finetune", [*settings, "run_dir=killed", "loop.total_steps=7"], place)


def test_a_student_of_a_classifier_and_one_of_features(place, features):
    write_manifest(place / "bare")
    distil(place, "task.teacher=classifier", "augment=glyphs",
                     "data.root=images", "run_dir=classes")  # fmt: skip
    run("evaluate", ["run_dir=classes", "runtime.device=cpu", "runtime.threads=1", "output=found"], place)
    assert "top1" in read_json(place / "found/metrics.json")
    rebuilt = open_weights(place / "classes/weights/best_weights.safetensors")
    assert rebuilt.kind.output == "classes" and rebuilt.task.class_names == ["A", "B"]

    path = features / "weights/best_weights.safetensors"
    rebuilt = open_weights(path)
    assert rebuilt.kind.output == "features" and rebuilt.task.teacher is None
    assert rebuilt.model(torch.zeros(1, 3, 32, 32))[0].shape == (1, 12)
    with refuses("^weights: a student of features "):
        run("evaluate", ["run_dir=features", "runtime.device=cpu", "runtime.threads=1"], place)
    run("finetune", [*TAGGER, "init_from=features", "model.dims=[6,12]", "run_dir=tuned"], place)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [("resnet1888", "'resnet1888'.*resnet18"), ("images", "images"), ("features", "'distillation'")],
)
def test_a_wrong_teacher_is_named(teacher, said, place, features):
    with refuses(re.compile(rf"^task\.teacher: .*{said}", re.DOTALL)):
        distil(place, f"task.teacher={teacher}", "run_dir=x")
    with refuses(r"^task\.teacher: .* takes images of 3 channels, but the student takes 1; set"):
        find_teacher(str(place / "teacher"), 1)


def test_a_teacher_of_timm_states_its_preprocessing_and_has_a_head_or_none():
    teacher, names = find_teacher("resnet18", 3)
    assert teacher["preprocessing"]["image_size_hw"] == [224, 224] and len(names["class_names"]) == 1000
    assert find_teacher("vit_small_patch14_dinov2.lvd142m", 3)[1] == {}
    with refuses(r"^task.teacher: timm has no weights named 'resnet18.nosuch'"):
        find_teacher("resnet18.nosuch", 3)
