"""What the accuracy benches count as seconds, what they conclude, and what they refuse; nothing is trained here."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from bench import commands, fashion_mnist, when_to_pretrain

# ------------------------------------------------------------------------------------------------------ Fashion-MNIST

# Of timm's train.py: two "epochs" of 30 updates. The rate in parentheses is the mean of the epoch so far.
TIMM_LOG = """
Train: 0 [   0/30 (  0%)]  Loss: 2.35 (2.35)  Time: 12.800s,   10.00/s  (12.800s,   10.00/s)  LR: 1.000e-05  Data: 0.9
Train: 0 [  10/30 ( 34%)]  Loss: 2.20 (2.28)  Time: 0.256s,  500.00/s  (1.408s,  100.00/s)  LR: 1.000e-05  Data: 0.1
Train: 0 [  29/30 (100%)]  Loss: 2.00 (2.18)  Time: 0.256s,  500.00/s  (0.768s,  200.00/s)  LR: 1.000e-05  Data: 0.1
Test: [   7/7]  Time: 0.120 (0.110)  Loss: 1.9 (2.0)  Acc@1: 30.0 (29.0)
Train: 1 [   0/30 (  0%)]  Loss: 1.90 (1.90)  Time: 0.512s,  250.00/s  (0.512s,  250.00/s)  LR: 5.000e-02  Data: 0.3
Train: 1 [  29/30 (100%)]  Loss: 1.70 (1.80)  Time: 0.256s,  500.00/s  (0.320s,  400.00/s)  LR: 5.000e-02  Data: 0.1
"""


def test_timms_seconds_are_read_without_those_of_its_start():
    settings = SimpleNamespace(quick=False, model={})
    training = fashion_mnist.TimmTraining(settings, "timm_defaults")
    assert training.batch == 128
    windows = training.windows(TIMM_LOG)
    assert [steps for steps, _ in windows] == [11, 19, 30]
    assert [seconds for _, seconds in windows] == pytest.approx([14.08, 19.2 - 14.08, 9.6])
    assert fashion_mnist.sec_per_step(windows) == pytest.approx((5.12 + 9.6) / 49)


def test_the_range_test_counts_as_seconds_of_train_py(tmp_path, monkeypatch):
    def run(self, name, seed, steps):
        self.folder = tmp_path / name
        return 0.5

    monkeypatch.setattr(fashion_mnist.OurTraining, "run", run)
    training = fashion_mnist.TrainTraining(SimpleNamespace(quick=False), "train")
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
    found = {"seconds": 25.0, "first_update_sec": 5.0}
    (tmp_path / "long/lr_finder.json").write_text(json.dumps(found))
    assert training.run("short", 0, 100) == 0.5  # it had none
    assert training.run("long", 0, 200) == 0.5 + 20 / 200


# --------------------------------------------------------------------------------------------------- when to pretrain


def test_arms_of_one_training_have_equal_steps():
    arms = when_to_pretrain.ARMS
    assert arms["convnext"].timed == arms["fcmae"].timed
    first, second = (set(arms[name].train.split()) for name in ("convnext", "fcmae"))
    assert {word.partition("=")[0] for word in first ^ second} == {"task.head"}


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "bench, word, said",
    [
        ("when_to_pretrain", "arm=x", "with a key of arms, labels"),
        ("when_to_pretrain", "arms=vit", "arms: 'vit' is not one of resnet18, convnext"),
        ("when_to_pretrain", "minutes=1,soon", "minutes: 'soon' is not a number above 0"),
        ("when_to_pretrain", "seeds=0", "seeds: '0' is not a whole number above 0"),
        ("lr_finder", "steps=nan", "steps: 'nan' is not a whole number above 0"),
        ("emoji_tags", "arms=vit", "arms: 'vit' is not one of fcmae, scratch, train, distilled, timm"),
        ("fashion_mnist", "seconds=nan", "seconds: 'nan' is not a number above 0"),
    ],
)
def test_a_bench_refuses(bench, word, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"bench/{bench}.py", word])
    monkeypatch.setattr(commands, "run_command", lambda *_: pytest.fail("a command was run"))
    module = importlib.import_module(f"bench.{bench}")
    with pytest.raises(SystemExit, match=rf"^{bench}: (?s:.*){said}"):
        module.main()
