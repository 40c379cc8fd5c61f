"""`task.append_to`: tags that a tagger lacks, fitted to its frozen features; what it had stays to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from engine.exports.predictors import load_predictor
from optim.linear import _PENALTY, fit_logits
from optim.ridge import standardise
from tests.in_process import SHORT, SMALL_MODEL, make_images, run, run_until_killed
from tests.support import assert_equal_runs, make_collection, rows
from utils.formats.thresholds import find_thresholds
from utils.formats.vocabulary import read_vocabulary
from utils.io.files import read_json
from utils.io.weight_files import find_weights
from utils.io.weights import read_weights

DATA = ["task=tagging", "task.min_count=1", "data=image_folder", "data.root=images"]
APPEND = [*DATA, "task.append_to=run", "runtime=reference", "runtime.device=cpu"]
OLD = ("general", "sensitive", "questionable", "explicit", "disc", "round", "square")


def test_a_solution_is_that_of_scikit_learn_on_the_images_whose_label_is_known():
    """The penalty is in proportion to the tag's positives, so it does not outweigh the few of a rare one."""
    torch.manual_seed(0)
    features, weight = torch.randn(150, 8).double(), torch.randn(8, 2).double()
    features, targets = standard(features), torch.bernoulli((features @ weight - torch.tensor([0, 2])).sigmoid())
    targets[::3, 1] = torch.nan
    found, bias = fit_logits(features, targets)
    for tag, labels in enumerate(targets.T):
        known = ~labels.isnan()
        share = labels[known].mean().item()
        model = LogisticRegression(C=1 / (_PENALTY * share * (1 - share) * known.sum().item()), tol=1e-10)
        wanted = model.fit(features[known].numpy(), labels[known].numpy())
        np.testing.assert_allclose([*found[tag], bias[tag]], [*wanted.coef_[0], wanted.intercept_[0]], atol=1e-4)


def test_few_steps_suffice_where_features_differ_in_size_and_images_are_fewer():
    """Sizes from 1 to 0.001 on the axes, as of a network."""
    torch.manual_seed(0)
    draws = torch.randn(60, 100).double()
    features = standard(draws @ (10 ** -torch.linspace(0, 3, 100).double().diag() @ torch.randn(100, 100).double()))
    targets = (draws[:, :2] > torch.tensor([0.5, 1.5])).double()
    found, bias = fit_logits(features, targets)
    for tag, labels in enumerate(targets.T):
        share = labels.mean().item()
        wanted = LogisticRegression(C=1 / (_PENALTY * share * (1 - share) * 60), tol=1e-10, max_iter=1000)
        wanted = wanted.fit(features.numpy(), labels.numpy()).decision_function(features.numpy())
        np.testing.assert_allclose(features @ found[tag] + bias[tag], wanted, atol=0.01)


def standard(features):
    mean, scale = standardise(features)
    return (features - mean) / scale


@pytest.fixture(scope="module")
def place(folder):
    """A tagger, and its collection with more tags."""

    def tag(words):
        for file in (folder / "images").rglob("*.txt"):
            file.write_text(words[file.parent.name])

    for number, file in enumerate(sorted(make_images(folder / "images").rglob("*.png"))):
        Image.new("RGB", (32, 32), (5 * number + 150 * (file.parent.name == "B"),) * 3).save(file)
    tag({"A": "square, rating:g", "B": "disc, round, rating:explicit"})
    run("train", [*SMALL_MODEL, *SHORT, *DATA, "run_dir=run", "model.head_init_scale=1.0", "data.background=[1,2,3]",
                  "augment.image_size_hw=[32,32]"], folder)  # fmt: skip
    tag({"A": "square, sharp, rating:g", "B": "disc, character:Bob, rating:q"})
    run("finetune", [*APPEND, "run_dir=more"], folder)
    return folder


def test_new_tags_follow_the_old_ones_which_stay_to_the_bit(place):
    (old, before), (new, after) = (read_weights(place / name / "weights/best_weights.safetensors")
                                   for name in ("run", "more"))  # fmt: skip
    assert after["tag_names"] == [*OLD, "sharp", "bob"] and after["tag_categories"][-2:] == [0, 4]
    assert read_vocabulary(place / "more").names == tuple(after["tag_names"])
    assert after["preprocessing"] == before["preprocessing"] and after["model"] == before["model"]
    assert all(torch.equal(new[name][: len(old[name])], old[name]) for name in old) and new.keys() == old.keys()
    images = torch.stack([torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (0, 90, 200)])
    one, other = (load_predictor(place / name / "weights/best_weights.safetensors", torch.device("cpu")).predict(images)
                  for name in ("run", "more"))  # fmt: skip
    np.testing.assert_allclose(other[:, : len(OLD)], one, rtol=1e-6)  # torch's last bit depends on the width


def test_new_tags_are_learned(place):
    run("predict", ["weights=more", "input=images/train", "output=x.jsonl", "threshold=0.5"], place)
    text = (place / "x.jsonl").read_text().splitlines()
    assert all(("sharp" in row, "bob" in row) == ("/A/" in row, "/B/" in row) for row in text)


def test_old_tags_that_the_collection_does_not_label_are_unknown_and_keep_their_thresholds(place):
    folder = make_collection(place / "others", per_class=1, classes="AB", validation=12)

    def calibrate(name, words):
        for number, file in enumerate(sorted(folder.rglob("*.png"))):
            Image.new("RGB", (32, 32), (number + 150 * (file.parent.name == "B"),) * 3).save(file)
            file.with_suffix(".txt").write_text(words[file.parent.name])
        run("evaluate", [f"run_dir={name}", "data.root=others", "calibrate=true", "output=found"], place)
        weights = place / name / "weights/best_weights.safetensors"
        table = find_thresholds(None, weights, read_weights(weights)[1]["weights_hash"])
        return {(row.profile, row.name): row for row in table.rows}, read_json(place / "found/metrics.json")

    old, _ = calibrate("run", {"A": "square", "B": "disc, round"})
    new, figures = calibrate("more", {"A": "sharp", "B": "character:bob"})
    kept = [*(("per_tag", name) for name in ("disc", "round", "square")), ("balanced", "general"), ("balanced", "all")]
    assert [new[key].threshold for key in kept] == [old[key].threshold for key in kept]
    assert all(new["per_tag", name].support > 0 and new["per_tag", name].note is None for name in ("sharp", "bob"))
    assert new["per_tag", "disc"].note and figures["mAP"] == 1
    assert figures["data"] == "others"


def test_a_tagger_that_is_trained_further_on_other_tags_keeps_its_own(place):
    """Also in a resumed run. The run's figures are of old and new tags."""
    for file in make_collection(place / "further", per_class=6, classes="AB", validation=4).rglob("*.txt"):
        file.write_text({"A": "sharp", "B": "character:bob"}[file.parent.name])
    base = [*SHORT, *DATA, "data.root=further", "init_from=run", "loop.total_steps=20", "loop.evaluate_every_epochs=99"]
    words = {"kept": ["optim.lr=0.01"], "lost": ["optim.lr=0.01", 'task.known=["*"]', "task.keep_old=0"]}
    for name, own in words.items():
        run("finetune", [*base, *own, f"run_dir={name}"], place)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    old, kept, lost = (load_predictor(find_weights(str(place / name), "last"), torch.device("cpu")).predict(images)
                       for name in ("run", *words))  # fmt: skip
    assert abs(kept[:, 4 : len(OLD)] - old[:, 4:]).mean() < abs(lost[:, 4 : len(OLD)] - old[:, 4:]).mean() / 3
    assert kept.shape[1] == len(OLD) + 2 and "mAP_new" in str(rows(place / "kept/metrics.jsonl"))
    run_until_killed("finetune", [*base, *words["kept"], "run_dir=killed"], place, step=10)
    run("finetune", [*base, *words["kept"], "run_dir=killed"], place)
    assert_equal_runs(place / "killed", place / "kept", 20)


@pytest.mark.parametrize(
    "words, message",
    [
        (["task.append_to=more"], "task.append_to: it has all 8 tags"),
        (["task.append_to=absent"], "task.append_to: absent does not exist"),
        (["init_from=run"], "^init_from: .*task.append_to"),
        (["++model.drop_path_rate=0.5"], "^model.drop_path_rate: .*task.append_to"),
    ],
)
def test_what_cannot_be_appended_is_refused(words, message, place):
    with pytest.raises(ValueError, match=message):
        run("finetune", [*APPEND, *words, "run_dir=x"], place)
