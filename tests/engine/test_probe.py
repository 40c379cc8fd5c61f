"""The probe of frozen features: equality with scikit-learn, degenerate features, and whole pretraining runs: the same
figures on any number of ranks, and the same run with and without.
"""

import shutil

import numpy as np
import pytest
import torch
from sklearn import linear_model
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from engine.measures.probe import measure_probes
from optim.ridge import PENALTIES, Ridge, standardise
from tests.in_process import TINY, run, run_until_killed
from tests.support import assert_equal_runs, assert_same_tensors, checkpoint_tensors, rows, training_log


def make_features(count, width, classes=4, seed=0, noise=1.0):
    """Return features [count, width], float64, and labels: a cloud for each class."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return torch.from_numpy(centres[labels] + noise * draw.normal(size=(count, width))), torch.from_numpy(labels)


def make_batches(features, labels, size, weight=None):
    """Return what a loader gives, with the features for images."""
    count = len(labels)
    weight = torch.ones(count) if weight is None else weight
    batch = {"images": features, "labels": labels, "sample_id": torch.arange(count), "weight": weight}
    return [{name: tensor[start : start + size] for name, tensor in batch.items()} for start in range(0, count, size)]


def measure(train, val):
    return measure_batches(make_batches(*train, 7), make_batches(*val, 7))


def measure_batches(train, val, k=5):
    return measure_probes(*([(batch["images"], batch) for batch in batches] for batches in (train, val)), k)


@pytest.mark.parametrize("count, width, classes", [(40, 12, 4), (20, 30, 4), (40, 30, 2)])
def test_leave_one_out_predictions_are_those_of_as_many_fits(count, width, classes):
    features, labels = make_features(count, width, classes, noise=2.0)
    targets = torch.eye(classes, dtype=torch.float64)[labels]
    mean, scale = standardise(features)
    standard = ((features - mean) / scale).numpy()
    ridge = Ridge(features, targets)
    for penalty in PENALTIES:
        fits = [linear_model.Ridge(penalty * count) for _ in range(2)]
        found = cross_val_predict(fits[0], standard, targets, cv=LeaveOneOut())
        assert torch.cat([part for _, part in ridge.left_out(penalty)]).numpy() == pytest.approx(found, abs=1e-9)
        weight, bias = ridge.solve(penalty)
        whole = fits[1].fit(standard, targets).predict(standard)
        assert (features @ weight.T + bias).numpy() == pytest.approx(whole, abs=1e-9)


def test_features_that_few_images_have_count_little():
    """By its own deviation alone, a feature of one image in 100 is the largest of a new image: 0.43 and 0.87."""
    sets = []
    for seed in (0, 1):
        features, labels = make_features(300, 12, seed=seed, noise=0.7)
        random = np.random.default_rng(seed + 7)
        rare = 0.3 * (random.random((300, 200)) < 0.01) * random.random((300, 200))
        sets.append((torch.cat([features, torch.from_numpy(rare)], dim=1), labels))
    assert min(measure(*sets).values()) > 0.95


def test_many_classes_of_few_images_do_not_want_the_least_squared_error():
    """It would choose a penalty of 1, which recognises 0.38: nearly 0 is the safest guess of a rare class."""
    mixing = 0.7 ** torch.arange(30.0)[:, None] * torch.from_numpy(np.random.default_rng(5).normal(size=(30, 30)))
    sets = [make_features(400, 30, classes=200, seed=seed, noise=0.3) for seed in (0, 1)]
    assert measure(*[(features @ mixing, labels) for features, labels in sets])["probe/linear"] > 0.9


def test_clear_features_are_recognised_and_noise_is_guessed():
    clear = measure(make_features(60, 12, noise=0.1), make_features(40, 12, seed=1, noise=0.1))
    assert clear == {"probe/knn": 1.0, "probe/linear": 1.0}
    noise = measure(make_features(400, 12, noise=50.0), make_features(400, 12, seed=1, noise=50.0))
    assert all(0.15 < value < 0.35 for value in noise.values())
    train, val = make_features(60, 12, noise=2.0), make_features(40, 12, seed=1, noise=2.0)
    moved = [((features + 1e3) * 1e-6, labels) for features, labels in (train, val)]  # unit and offset do not matter
    state = torch.get_rng_state()
    assert measure(*moved) == measure(train, val)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from it


# ------------------------------------------------------------------------------------------------- degenerate features


def test_padding_and_unreadable_images_are_ignored_and_batches_do_not_matter():
    train, val = make_features(41, 12, noise=3.0), make_features(30, 12, seed=1, noise=3.0)
    whole = measure(train, val)
    blank = torch.full((9, 12), 1e6, dtype=torch.float64)
    padded = []
    for features, labels in (train, val):
        weight = (torch.arange(len(labels) + 9) < len(labels)).float() * 0.5  # a weight above 0 counts as one image
        labels = torch.cat([labels, torch.zeros(9, dtype=torch.int64)])
        padded.append(make_batches(torch.cat([features, blank]), labels, 4, weight))
    assert measure_batches(*padded) == whole == measure_batches(*[list(reversed(batches)) for batches in padded])


def test_features_that_are_not_finite_or_not_there_are_told_and_end_nothing(log):
    train, val = make_features(20, 3), make_features(10, 3, seed=1)
    assert measure_batches(make_batches(*train, 4, torch.zeros(20)), make_batches(*val, 4)) == {}
    train[0][3, 1] = torch.nan
    assert measure(train, val) == {}
    assert log.text.count("probe: skipped") == 2


# ---------------------------------------------------------------------------------------------------------- whole runs


def probed(run_dir, of=""):
    """Return the steps of a run's evaluations with a probe; of: ema/ for those of the average."""
    names = {f"{of}probe/knn", f"{of}probe/linear"}
    return [row["step"] for row in rows(run_dir / "metrics.jsonl", "evaluate") if names <= row.keys()]


def pretrain(data, folder, *settings, killed_at=None):
    """Pretrain in `folder`, 20 steps of 8 images; killed_at: a step after which the run is killed and resumed."""
    overrides = [
        *TINY, "task.decoder_dim=16", "loop.batch_size=8", "loop.micro_batch_size=4", "loop.total_steps=20",
        "optim.lr=0.005", f"data.root={data}", "run_dir=.", *settings,
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    if killed_at is not None:
        run_until_killed("pretrain_fcmae", overrides, folder, killed_at)
    run("pretrain_fcmae", overrides, folder)
    return (folder / "log.txt").read_text()


def test_a_run_with_a_probe_is_the_same_run_killed_or_not(collection, tmp_path):
    """54 images by 8: evaluations at 7, 14 and 20; one and a half epochs end in step 11, so the probe comes at 14."""
    settings = ["loop.ema_decay=0.95", "loop.evaluate_every_epochs=1.0", "model.drop_path_rate=0.3"]
    for name, every, killed_at in (("with", "1.5", None), ("killed", "1.5", 12), ("without", "null", None)):
        pretrain(collection, tmp_path / name, *settings, f"task.probe.every_epochs={every}", killed_at=killed_at)
    assert probed(tmp_path / "with", "ema/") == [14, 20] and probed(tmp_path / "without", "ema/") == []
    assert_equal_runs(tmp_path / "with", tmp_path / "killed", 20)
    assert_same_tensors(*(checkpoint_tensors(tmp_path / name, 20) for name in ("with", "without")))
    assert [bool(line["ema/probe/linear"]) for line in training_log(tmp_path / "with")] == [False, True, True]


def test_without_labels_one_line_says_that_the_probe_is_off(collection, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for path in collection.glob(f"{split}/*/*.png"):
            shutil.copy(path, tmp_path / "flat" / split / f"{path.parent.name}{path.name}")
    said = pretrain(tmp_path / "flat", tmp_path / "run", "loop.total_steps=2")
    assert said.count("probe: off") == said.count("task.probe.every_epochs=null") == 1
    assert not (tmp_path / "run/tables").exists() and ", tables" not in said
    assert "loss" in rows(tmp_path / "run/metrics.jsonl", "evaluate")[-1] and probed(tmp_path / "run") == []
