"""A table of texts: its columns are aligned, and no line ends in spaces."""

from utils.text_table import align_columns, show_rows


def test_columns_are_as_wide_as_their_widest_text():
    assert align_columns([("name", "n"), ("a", "1000"), ("longest", "")]) == "name     n\na        1000\nlongest"


def test_cells_are_written_for_people():
    rows = [{"a": 0.123456, "b": 1234, "c": None}, {"a": 1.0, "b": "x", "c": 12.0}]
    assert show_rows(rows) == "a       b      c\n0.1235  1,234\n1       x      12"
