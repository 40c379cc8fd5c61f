"""The range test: that its updates are the run's, that it leaves no trace, and that its rate is the run's."""

import itertools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from engine.run.lr_finder import _Curve, range_test, rate_at, suggest, undone
from optim.schedules import GroupValues, Schedule
from tests.engine.test_learner import OURS, in_fp16, make_batch, make_learner, tensors_of
from tests.in_process import TINY, configure, make_images, run, run_command
from tests.support import assert_same_tensors, logged, refuses
from utils.config.messages import ConfigError
from utils.io.files import read_json
from utils.io.weights import read_weights
from utils.ranks.signals import Stopped, StopRequest

# ---------------------------------------------------------------------------------------------------------- the curve

RATES = [10 ** (-5 + 6 * number / 99) for number in range(100)]


def make_curve(loss_at, noise=0.0, count=100, seed=7):
    noises = noise * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _Curve(RATES[:count], [loss_at(math.log10(rate)) + float(one) for rate, one in zip(RATES, noises)])


def valley(place):
    """Fall by 1 around 10**-2.5, lowest at 0.1, then rise."""
    return 2.0 - 1.0 / (1 + math.exp(-6 * (place + 2.5))) + max(0.0, place + 1) ** 2 * 5


def falls_again(place):
    """The valley until a rise of 0.6, then a second, deeper fall, as of networks with batch norm."""
    return valley(place) if place < -0.65 else 1.6 - 2.0 * (place + 0.65)


@pytest.mark.parametrize("noise, loss_at", [(0.0, valley), (0.2, valley), (0.05, falls_again)])
def test_the_rate_is_where_the_loss_has_risen_by_a_quarter_of_its_fall(loss_at, noise):
    """5 (place + 1) ** 2 is a quarter at a rate of 0.17; the means of nine losses and the noise move it a little."""
    rate, _ = suggest(make_curve(loss_at, noise), adaptive=False)
    assert 0.1 < rate < 0.3
    assert suggest(make_curve(loss_at, noise), adaptive=True)[0] == pytest.approx(rate / 10)


def test_a_curve_that_never_falls_has_no_answer():
    """Noise alone passes for a fall of three standard deviations now and then."""
    found = [suggest(make_curve(lambda place: 2.0, 0.3, seed=seed), adaptive=False)[0] for seed in range(50)]
    assert sum(rate is not None for rate in found) <= 20


# ---------------------------------------------------------------------------------------------------------- the sweep


class Recorder:
    def enters(self, *_):
        pass


def sweep(learner, batches, steps, *, total_steps=1000):
    """A range test of a learner alone."""
    return range_test(learner, batches, SimpleNamespace(total_steps=total_steps, range_test_steps=steps), Recorder())


def test_the_updates_are_the_runs_own():
    """With its precision, its micro-batches, its clipping and its groups' ratios: a loop over the learner's update."""
    settings = ["optim=sgd", "runtime.precision=bf16", "loop.clip_grad_norm=0.01", "optim.layer_decay=0.5"]
    halves = [{name: tensor[half::2] for name, tensor in make_batch().items()} for half in (0, 1)]
    curve = sweep(make_learner(*settings), itertools.repeat(halves), 12)
    learner, losses = make_learner(*settings), []
    decay = learner.schedule.weight_decay
    for step in range(12):
        total, weight = learner.update(halves, GroupValues(rate_at(step, 12), decay)).sums["loss"]
        losses.append(float(total) / float(weight))
    assert weight == 8 and curve.losses == losses[: len(curve.losses)] and len(curve.losses) > 9
    assert all(group["lr"] == pytest.approx(10.0 * group["lr_scale"]) for group in learner.optimizer.param_groups)


@pytest.mark.parametrize("freeze_steps, is_swept", [(100, True), (1000, False)])
def test_what_the_run_freezes_at_first_takes_part(freeze_steps, is_swept):
    """Its rate is the one that is found, after it thaws. What the run of 1000 steps never trains stays frozen."""
    learner = make_learner("optim=sgd", f'optim.rules=[{{match: "network.stages.*", freeze_steps: {freeze_steps}}}]')
    frozen = [group["freeze_steps"] for group in learner.optimizer.param_groups]
    before = tensors_of(learner)
    with undone(learner):
        sweep(learner, itertools.repeat([make_batch()]), 5)
        swept = tensors_of(learner)
    assert freeze_steps in frozen and [group["freeze_steps"] for group in learner.optimizer.param_groups] == frozen
    changed = {name for name in before if name.startswith("weights/") and not torch.equal(swept[name], before[name])}
    assert any(name.startswith("weights/stages.") for name in changed) == is_swept
    assert "weights/downsample_layers.0.0.weight" in changed


@pytest.mark.parametrize("factor", [100.0, math.nan])
def test_it_ends_where_the_loss_diverges_or_is_no_number(factor):
    """Not at the first step that is skipped: the loss scale of fp16 may be too high for a moment."""
    learner, applied = make_learner("optim=sgd"), []
    finite = learner.update

    def update(batches, values):
        for parameter in learner.task.parameters() if len(applied) >= 8 else ():
            parameter.data.mul_(factor)
        result = finite(batches, values)
        applied.append(bool(result.applied))
        return result

    learner.update = update
    curve = sweep(learner, itertools.repeat([make_batch()]), 40)
    assert curve.diverged and len(applied) < 20 and all(map(math.isfinite, curve.losses))
    assert math.isfinite(factor) or applied[8:] == [False] * 4


def test_a_batch_that_cannot_be_read_is_no_point_of_the_curve_and_a_signal_ends_it():
    blank, learner = {**make_batch(), "weight": torch.zeros(8)}, make_learner("optim=sgd")
    curve = sweep(learner, itertools.cycle([[blank], [make_batch()]]), 6)
    assert not curve.diverged and curve.rates == [rate_at(step, 6) for step in (1, 3, 5)]
    with StopRequest() as stop, pytest.raises(Stopped):
        stop.requested = True
        sweep(learner, itertools.repeat([make_batch()]), 5)
    assert learner.step == 6


def everything(learner):
    """All that an update may change: tensors, and as text group values, step, schedule and generator."""
    groups = [sorted({**group, "params": None}.items()) for group in learner.optimizer.param_groups]
    rest = groups, learner.state()[1], learner.step, learner.schedule, torch.random.get_rng_state().sum().item()
    return tensors_of(learner), repr(rest)


LEARNERS = {
    "before the first update": (["optim=sgd"], OURS),
    "adamw, average": (["optim=adamw", "loop.ema_decay=0.9"], OURS),
    "lamb": (["optim=timm", "optim.opt=lamb"], OURS),
    "buffers": (["optim=sgd"], ("model=timm", "model.name=resnet18")),
    "fp16": (["optim=sgd"], OURS),
}


@pytest.mark.parametrize("case", LEARNERS)
def test_no_trace_is_left_of_it(case):
    """Bit for bit; the rates are high enough for numbers that overflow."""
    overrides, model = LEARNERS[case]
    learner, batch = make_learner(*overrides, model=model), make_batch()
    learner = in_fp16(learner) if case == "fp16" else learner
    for _ in range(0 if case.startswith("before") else 2):
        learner.update([batch])
    tensors, rest = everything(learner)
    with undone(learner):
        for _ in range(4):
            learner.update([batch], GroupValues(10.0, 0.0))
        swept = tensors_of(learner)
        assert not all(torch.equal(swept[name], tensor) for name, tensor in tensors.items() if "weights/" in name)
    after, rest_after = everything(learner)
    assert_same_tensors(after, tensors)
    assert rest_after == rest


# ------------------------------------------------------------------------------------------------------------ the run

SEARCH = [
    "lr_finder.enabled=true", "loop.total_steps=100", "optim=sgd", "schedule=onecycle",
    "loop.checkpoint_every_steps=50", "loop.evaluate_every_epochs=1000", "loop.clip_grad_norm=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def searched(folder):
    """A run with a range test: its folder and that of the working directory."""
    images = make_images(folder / "images")
    base = [*TINY, "model.head_init_scale=1.0", f"data.root={images}"]
    run("finetune", [*base, *SEARCH, f"run_dir={folder}/run"], folder)
    return folder, base


def rate_of_cycle(steps, peak, update):
    config, _ = configure("finetune", SEARCH)
    return pytest.approx(Schedule(config.schedule, peak, 0.0, steps, 0).at(update - 1).lr, rel=1e-9)


def found_by(run_dir):
    return read_json(run_dir / "lr_finder.json")


def test_the_test_alone_ends_and_the_same_command_without_it_trains(searched, monkeypatch):
    folder, base = searched
    words = [*base, *SEARCH[1:], f"run_dir={folder}/alone"]
    assert run_command("finetune", [*words, "lr_finder.only=true"], folder, monkeypatch) == 0
    assert found_by(folder / "alone")["taken"] == found_by(folder / "run")["taken"]
    assert not (folder / "alone/weights/last_weights.safetensors").exists()
    run("finetune", words, folder)
    with refuses(r"^lr_finder.only: .*alone has 100 updates;"):
        run("finetune", [*words, "lr_finder.only=true"], folder)


def test_the_run_equals_one_whose_rate_was_given(searched):
    """The test before it leaves no trace, and its rate is the peak of the schedule; file and picture say why."""
    folder, base = searched
    found = found_by(folder / "run")
    assert f"lr_finder: takes {found['taken']:.3g}, {found['reason']}" in (folder / "run/log.txt").read_text()
    assert found["configured"] != found["taken"] in found["rates"]
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"]) > 18
    assert (folder / "run/plots/lr_finder_plot.png").stat().st_size > 10_000
    given = [override for override in SEARCH if not override.startswith("lr_finder")]
    run("finetune", [*base, *given, f"optim.lr={found['taken']!r}", f"run_dir={folder}/given"], folder)
    assert_same_tensors(
        *(read_weights(folder / name / "weights/last_weights.safetensors")[0] for name in ("run", "given"))
    )
    rates, given = (logged(folder / name, "train", "lr") for name in ("run", "given"))
    assert max(rates) == pytest.approx(found["taken"], rel=0.05) and rates == given


def test_a_resumed_run_does_not_search_again_unless_it_is_given_a_rate(searched, tmp_path, capsys):
    """It continues at the rate found, in the same recipe's folder."""
    folder, base = searched
    path = shutil.copytree(folder / "run", tmp_path / "run")
    run("finetune", [*base, *SEARCH, "loop.total_steps=102", f"run_dir={path}"], folder)
    said = capsys.readouterr().err
    assert "resumed from" in said and "lr_finder" not in said and "the peak learning rate is" in said
    found = found_by(path)["taken"]
    assert read_json(path / "checkpoints/step_00000102/state.json")["found_lr"] == found
    assert logged(path, "train", "lr")[-1] == rate_of_cycle(102, found, 102)

    given = ["lr_finder.enabled=false", "optim.lr=0.5", "resume_allow=[optim.lr,lr_finder.enabled]"]
    run("finetune", [*base, *SEARCH, *given, "loop.total_steps=103", f"run_dir={path}"], folder)
    assert "the peak learning rate is" not in capsys.readouterr().err
    assert logged(path, "train", "lr")[-1] == rate_of_cycle(103, 0.5, 103)


def test_a_rate_beside_a_range_test_is_refused():
    with pytest.raises(ConfigError, match=r"optim.lr: 0.3 is not used"):
        configure("finetune", ["lr_finder.enabled=true", "optim.lr=0.3"])
    configure("finetune", ["lr_finder.enabled=true", "optim.base_lr=0.3"])


def test_no_answer_keeps_the_rate_and_says_so(searched, capsys, monkeypatch):
    folder, base = searched
    monkeypatch.setattr("engine.run.lr_finder.range_test", lambda *_: _Curve(RATES, [2.0] * 100))
    run("finetune", [*base, *SEARCH, f"run_dir={folder}/flat", "optim.base_lr=1.28"], folder)
    assert "lr_finder: no answer" in capsys.readouterr().err
    assert found_by(folder / "flat")["taken"] is None
    assert max(logged(folder / "flat", "train", "lr")) == pytest.approx(0.02, rel=0.05)
