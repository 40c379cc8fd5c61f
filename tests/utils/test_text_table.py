"""A table of texts: its columns are aligned, and no line ends in spaces."""

from utils.text_table import align_columns


def test_columns_are_as_wide_as_their_widest_text():
    assert align_columns([("name", "n"), ("a", "1000"), ("longest", "")]) == "name     n\na        1000\nlongest"
