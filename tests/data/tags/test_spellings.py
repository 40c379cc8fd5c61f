"""Spellings of tags: separators alone make a variant, signs do not; the rarer name goes to the more frequent one."""

from data.tags.spellings import find_variants
from utils.formats.spelling import Tag


def test_names_that_differ_in_separators_alone_are_variants():
    counts = {"1girl": 60, "1_girl": 20, "t-shirt": 3, "t_shirt": 9, "tshirt": 1, ":d": 5, "d": 2, "^_^": 4, "^^": 4}
    counts |= {"_": 1, "-": 2, "x_x": 1, "long_hair": 0, "longhair": 7}
    found = [(Tag(0, name), count) for name, count in counts.items()]
    assert find_variants(found) == {"1_girl": "1girl", "t-shirt": "t_shirt", "tshirt": "t_shirt"}
