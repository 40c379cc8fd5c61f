"""The recorder: when curves are drawn. What it writes is tested with whole runs (test_survival, test_exactness)."""

import pytest

import engine.recorder
import utils.record.plots
from engine.plan import Plan
from engine.recorder import Recorder
from engine.runtime import choose_runtime
from tests.in_process import SHORT, SMALL_MODEL, configure


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Return (a recorder of a run of 100 steps whose drawings take a second, the steps drawn, a clock to set)."""
    config, _ = configure("finetune", [*SMALL_MODEL, *SHORT])
    plan = Plan(1, 8, 8, 1, 80, 100, 0, 1e-3)
    recorder = Recorder(config, plan, None, choose_runtime(config.runtime), tmp_path)
    recorder.open(0, str)
    clock, steps = {"now": 1000.0}, []

    def draw(metrics, path, title):
        clock["now"] += 1.0
        steps.append(recorder.watchdog._phase)

    monkeypatch.setattr(utils.record.plots, "plot_curves", draw)
    monkeypatch.setattr(engine.recorder.time, "perf_counter", lambda: clock["now"])
    yield recorder, steps, clock
    recorder.close()


def test_evaluations_in_quick_succession_draw_in_a_twentieth_of_the_time(drawn):
    recorder, steps, clock = drawn
    for step in range(1, 100):
        clock["now"] += 2.0
        recorder.plot(step, may_skip=True)
    assert len(steps) == pytest.approx(99 * 2 / 21, abs=1) and steps[0] == "step 1: plotting"


def test_the_last_evaluation_and_steps_that_were_asked_for_are_always_drawn(drawn):
    recorder, steps, _ = drawn
    recorder.plot(1, may_skip=True)
    recorder.plot(2, may_skip=True)
    recorder.plot(3)
    recorder.plot(100, may_skip=True)
    assert steps == ["step 1: plotting", "step 3: plotting", "step 100: plotting"]
