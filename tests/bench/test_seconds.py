"""What the accuracy benches count as seconds, what they conclude, and what they refuse; nothing is trained here."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from bench import commands, fashion_mnist, lightly, when_to_pretrain

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
    found = {"seconds": 25.0, "curve": {"first_update_sec": 5.0}}
    (tmp_path / "long/lr_finder.json").write_text(json.dumps(found))
    assert training.run("short", 0, 100) == 0.5  # it had none
    assert training.run("long", 0, 200) == 0.5 + 20 / 200


# --------------------------------------------------------------------------------------------------- when to pretrain


def test_arms_of_one_training_have_equal_steps():
    arms = when_to_pretrain.ARMS
    assert arms["simclr"].timed == arms["dino"].timed and arms["convnext"].timed == arms["fcmae"].timed
    for one, other in (("simclr", "dino"), ("convnext", "fcmae")):
        first, second = (set(arms[name].train.split()) for name in (one, other))
        assert {word.partition("=")[0] for word in first ^ second} <= {"optim.lr", "task.head"}


@pytest.mark.parametrize("native", [True, False])
def test_lightly_train_gets_the_precision_of_ours_and_runs_once(native, tmp_path, monkeypatch):
    calls = []

    def pretrain(python, training, folder, steps):
        calls.append((python, training, steps))
        folder.mkdir(parents=True)
        return lightly.Pretrained(8.0, 2.0, folder / "run/weights.pt")

    monkeypatch.setattr(lightly, "pretrain", pretrain)
    monkeypatch.setattr(when_to_pretrain, "has_fast_bf16", lambda device: native)
    bench = SimpleNamespace(out=tmp_path, images=tmp_path / "images.txt", lightly_python="python3", threads=2)
    twice = [
        when_to_pretrain.Bench.pretrain_alone(bench, "dino", "pre_dino_10_3", 4, 3, threads) for threads in (None, 1)
    ]
    weights = str(tmp_path / "runs/pre_dino_10_3/run/weights.pt")
    assert [list(found) for found in twice] == [[weights, 2.0]] * 2
    (python, training, steps), *more = calls
    assert not more and (python, steps) == ("python3", 4)
    assert (training.method, training.seed, training.threads, training.in_channels) == ("dino", 3, 2, 3)
    assert training.changes == ({"precision": "bf16-mixed"} if native else {})


FOUND = {  # minutes -> (mean, least, greatest)
    ("few", "fcmae"): {1.0: (0.1, 0.1, 0.1), 4.0: (0.6, 0.5, 0.7), 10.0: (0.8, 0.8, 0.8), 40.0: (0.9, 0.9, 0.9)},
    ("few", "resnet18"): {1.0: (0.3, 0.3, 0.3), 4.0: (0.4, 0.4, 0.4), 10.0: (0.5, 0.5, 0.5)},
    ("few", "convnext"): {1.0: (0.2, 0.2, 0.2), 4.0: (0.3, 0.3, 0.3), 10.0: (0.6, 0.6, 0.6)},
}


def test_a_crossing_is_where_fcmae_overtakes_the_best_start_from_scratch():
    """From 0.2 behind at one minute to 0.2 ahead at four: half way on a logarithmic scale."""
    assert when_to_pretrain.crossings(FOUND, "few") == pytest.approx([2.0])
    behind = {key: dict.fromkeys(by, (0.01, 0.01, 0.01)) if key[1] == "fcmae" else by
              for key, by in FOUND.items()}  # fmt: skip
    assert when_to_pretrain.crossings(behind, "few") == []
    alone = {("few", "fcmae"): FOUND["few", "fcmae"]}
    assert when_to_pretrain.crossings(alone, "few") == []


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "bench, word, said",
    [
        ("when_to_pretrain", "arm=x", "with a key of arms, labels"),
        ("when_to_pretrain", "arms=vit", "arms: 'vit' is not one of resnet18, convnext"),
        ("when_to_pretrain", "minutes=1,soon", "minutes: 'soon' is not a number above 0"),
        ("when_to_pretrain", "seeds=0", "seeds: '0' is not a whole number above 0"),
        ("when_to_pretrain", "at_once=1.5", "at_once: '1.5' is not a whole number above 0"),
        ("lr_finder", "rates=0.1,x", "rates: 'x' is not a number above 0"),
        ("lr_finder", "seeds=nan", "seeds: 'nan' is not a whole number above 0"),
        ("fashion_mnist", "seconds=nan", "seconds: 'nan' is not a number above 0"),
    ],
)
def test_a_bench_refuses(bench, word, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"bench/{bench}.py", word])
    monkeypatch.setattr(commands, "run_command", lambda *_: pytest.fail("a command was run"))
    module = importlib.import_module(f"bench.{bench}")
    with pytest.raises(SystemExit, match=rf"^{bench}: (?s:.*){said}"):
        module.main()
