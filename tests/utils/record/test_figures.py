"""Figures in a line."""

from utils.record.figures import show_figures


def test_counts_are_whole_numbers_and_all_else_has_four_digits():
    assert show_figures({"mAP": 0.52034, "top1": 1.0, "samples": 1553.0}) == "mAP=0.5203  top1=1.0000  samples=1553"
    assert show_figures({"loss": 21.61751, "f1": 0.0}) == "loss=21.6175  f1=0.0000"
