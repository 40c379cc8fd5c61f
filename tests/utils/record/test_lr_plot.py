"""The picture of a range test: which rates it marks, and what its axis of losses shows."""

import matplotlib.pyplot as plt
import pytest

from utils.record import lr_plot

RATES = [10.0**-number for number in range(5, -1, -1)]
FALLS = [2.0, 2.0, 1.5, 1.0, 1.2, 40.0]
SUGGESTIONS = {"steepest": 1e-3, "minimum_half": 5e-4, "minimum_tenth": 1e-4, "valley": 2e-3}


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw a range test; returns its axis, and the figure is not written."""
    kept = []
    monkeypatch.setattr(lr_plot, "save_figure", lambda figure, path: kept.append(figure))

    def draw(losses, suggestions, taken):
        lr_plot.plot_range_test(RATES, (losses, losses), suggestions, taken, "$MODEL_$SEED", tmp_path / "plot.png")
        return kept[-1].axes[0]

    yield draw
    for figure in kept:
        plt.close(figure)


def test_every_suggestion_is_marked_at_its_rate_and_one_is_taken(draw):
    axis = draw(FALLS, SUGGESTIONS, "steepest")
    upright = {line.get_label(): line for line in axis.lines if len(set(line.get_xdata())) == 1}
    assert {label: line.get_xdata()[0] for label, line in upright.items()} == {
        "steepest descent: 0.001  (taken)": 1e-3, "minimum / 2: 0.0005": 5e-4, "minimum / 10: 0.0001": 1e-4,
        "valley: 0.002": 2e-3,
    }  # fmt: skip
    assert [line.get_linestyle() for line in upright.values()] == ["-", "--", "--", "--"]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["loss", "smoothed", *upright]
    axis.figure.canvas.draw()  # the title is no mathematics


def test_of_two_methods_with_one_rate_one_is_taken(draw):
    axis = draw(FALLS, SUGGESTIONS | {"valley": 1e-3}, "valley")
    marked = [line.get_label() for line in axis.lines if "taken" in line.get_label()]
    assert marked == ["valley: 0.001  (taken)"]


def test_a_curve_without_an_answer_marks_none(draw):
    axis = draw(FALLS, {}, None)
    assert [line.get_label() for line in axis.lines] == ["loss", "smoothed"]


def test_the_axis_shows_the_fall_and_not_how_far_the_loss_diverges(draw):
    """Without an answer half as much again, so that a divergence is seen."""
    low, high = draw(FALLS, SUGGESTIONS, "steepest").get_ylim()
    assert low < 1.0 and 2.0 < high < 2.2
    assert 2.9 < draw(FALLS, {}, None).get_ylim()[1] < 3.3
    falls = [-1.0, -1.0, -1.2, -1.5, -1.4, 5.0]  # a loss may be below zero
    low, high = draw(falls, {}, None).get_ylim()
    assert low < -1.5 and -0.6 < high < 0
