"""Emphasis: literal cases, most of them of the web UI's documentation."""

import pytest

from utils.formats.emphasis import escape, read_emphasis

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("normal text", [[("normal text", 1)]]),
        ("an (important) word", [[("an ", 1), ("important", UP), (" word", 1)]]),
        ("(unnecessary)(parens)", [[("unnecessaryparens", UP)]]),
        (r"\(literal\]", [[("(literal]", 1)]]),
        (r"miku \(vocaloid\) \\(a)", [[("miku (vocaloid) \\", 1), ("a", UP)]]),
        (
            "a ((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                [("a ", 1), ("house", 1.3 * UP), (" ", 1), ("on", DOWN), (" a ", 1), ("hill", 0.5), (", sun, ", 1)]
                + [("sky", UP**3), (".", 1)]
            ],
        ),
        ("(a (b:1.5), {c} :2)", [[("a ", 2), ("b", 3), (", ", 2), ("c", 2.4)]]),
        ("a BREAK (b BREAK c:-.5) BREAKFAST", [[("a", 1)], [("b", -0.5)], [("c", -0.5), (" BREAKFAST", 1)]]),
        ("(unbalanced", [[("(unbalanced", 1)]]),
        ("b) ([c:1.2)", [[("b) ", 1), ("[c", 1.2)]]),
        ("(:3) :( 16:9", [[(":3", UP), (" :( 16:9", 1)]]),  # faces
        ("(taken: 2020) (a:12)", [[("taken: 2020", UP), (" ", 1), ("a:12", UP)]]),
        ("()", [[]]),
    ],
)
def test_brackets_are_read_as_the_web_uis_read_them(text, chunks):
    found = read_emphasis(text)
    assert [[part for part, _ in chunk] for chunk in found.chunks] == [[part for part, _ in chunk] for chunk in chunks]
    for ours, wanted in zip(found.chunks, chunks):
        assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in wanted])
    assert read_emphasis(escape(text)).plain == text.replace(" BREAK ", " ")
