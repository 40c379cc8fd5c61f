"""Class weights: each class gets the same sum, the mean over images is 1, and only training is weighted."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.tasks.classification import balance
from engine.tasks.kind import Setup
from engine.tasks.kinds import KINDS
from engine.tasks.mixing import Mixing
from tests.engine.test_learner import OURS, make_batch
from tests.in_process import SHORT, configure, make_images, run
from utils.io.weights import read_weights


def test_balance_is_inverse_to_the_size_of_a_class():
    ids, names = np.array([0, 0, 0, 0, 1, 1, 2, -1]), ["a", "b", "c"]
    weights = balance(ids, np.ones(8), names)
    assert weights == pytest.approx([7 / 12, 7 / 6, 7 / 3])
    assert np.mean([weights[number] for number in ids[:-1]]) == pytest.approx(1.0)
    # An image counts by its weight, which is 0 in a manifest where it cannot be read; a class may have none.
    weight = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    weights = balance(ids, weight, names)
    assert weights[:2] == pytest.approx([2.5 / 2, 2.5 / 3])
    assert sum(weight[:-1] * [weights[number] for number in ids[:-1]]) == pytest.approx(2.5)


# With mixup, three quarters of an image's own class and one of its partner's: image i is mixed with image 7 - i.
@pytest.mark.parametrize(
    "mixup, weights", [(0.0, [4.0, 1.0, 0.5, 0.0]), (1.0, [3.0, 0.875, 0.625, 1.0])], ids=["plain", "mixup"]
)
def test_the_loss_of_training_is_weighted(mixup, weights, monkeypatch):
    """By the weight of an image's class; an image mixed from two classes has a mixed weight."""
    monkeypatch.setattr(Mixing, "draw", lambda self, height, width: (0.75, None))
    config, _ = configure("train", [*OURS, *SHORT, f"task.mixup_alpha={mixup}", "task.label_smoothing=0.0"])
    facts = {"class_names": ["a", "b", "c", "d"], "class_weights": [4.0, 1.0, 0.5, 0.0]}
    torch.manual_seed(0)
    task = KINDS["classification"].build(Setup(config.model, config.task, config.augment.preprocessing(3), facts))
    batch = make_batch()
    images, targets = task.normalise(batch["images"]), F.one_hot(batch["labels"], 4).float()
    plain = F.cross_entropy(task.network(images), targets, reduction="none")
    if mixup:
        images, targets = (torch.lerp(each.flip(0), each, 0.75) for each in (images, targets))
        torch.testing.assert_close(targets @ torch.tensor(facts["class_weights"]), torch.tensor(2 * weights))
    expected = F.cross_entropy(task.network(images), targets, reduction="none") * torch.tensor(2 * weights)
    torch.testing.assert_close(task.train()(batch, 0.0).loss, expected)
    torch.testing.assert_close(task.eval()(batch, 0.0).loss, plain)


def test_a_run_has_them_and_its_weight_file_does_not(tmp_path, capsys):
    images = make_images(tmp_path / "images")
    for number in range(2):
        (images / f"train/B/00{number}.png").unlink()
    run("train", [*OURS, *SHORT, "data=image_folder", f"data.root={images}", "task.class_weights=balanced",
                  "run_dir=run", "lr_finder.enabled=false", "tracking.live_plots=false"], tmp_path)  # fmt: skip
    assert "task.class_weights=balanced: from 0.75 (A) to 1.5 (B)" in capsys.readouterr().err
    metadata = read_weights(tmp_path / "run/weights/last_weights.safetensors", "weights")[1]
    assert metadata["class_names"] == ["A", "B"] and "class_weights" not in metadata
