"""Emphasis: literal cases, most of them of the web UI's documentation."""

import pytest

from utils.formats.emphasis import escape, read_emphasis

UP, DOWN = 1.1, 1 / 1.1


# Chunks are separated by #, the parts of a chunk, each with its weight, by |.
CASES = [
    ("normal text", "normal text", [1]),
    ("an (important) word", "an |important| word", [1, UP, 1]),
    ("(unnecessary)(parens)", "unnecessaryparens", [UP]),
    (r"\(literal\]", "(literal]", [1]),
    (r"miku \(vocaloid\) \\(a)", "miku (vocaloid) \\|a", [1, UP]),
    ("a ((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", "a |house| |on| a |hill|, sun, |sky|.",
     [1, 1.3 * UP, 1, DOWN, 1, 0.5, 1, UP**3, 1]),
    ("(a (b:1.5), {c} :2)", "a |b|, |c", [2, 3, 2, 2.4]),
    ("a BREAK (b BREAK c:-.5) BREAKFAST", "a#b#c| BREAKFAST", [1, -0.5, -0.5, 1]),
    ("(unbalanced", "(unbalanced", [1]),
    ("b) ([c:1.2)", "b) |[c", [1, 1.2]),
    ("(:3) :( 16:9", ":3| :( 16:9", [UP, 1]),  # faces
    ("(taken: 2020) (a:12)", "taken: 2020| |a:12", [UP, 1, UP]),
    ("()", "", []),
]  # fmt: skip


@pytest.mark.parametrize("text, parts, weights", CASES)
def test_brackets_are_read_as_the_web_uis_read_them(text, parts, weights):
    found = read_emphasis(text)
    assert "#".join("|".join(part for part, _ in chunk) for chunk in found.chunks) == parts
    assert len(found.chunks) == 1 + parts.count("#")
    assert [weight for chunk in found.chunks for _, weight in chunk] == pytest.approx(weights)
    assert read_emphasis(escape(text)).plain == text.replace(" BREAK ", " ")
