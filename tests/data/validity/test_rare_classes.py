"""Whether answering one class alone looks like a result."""

import pyarrow as pa
import pytest

from data.validity.questions import find_rare_classes


@pytest.mark.parametrize(
    "counts, is_named",
    [((285, 15), True), ((60, 40), False), ((34, 17, 11, 9, 7), False), ((9,), False), ((), False)],
    ids=["rare", "uneven", "a long tail", "one class", "no class"],
)
def test_a_class_that_rules_is_named(counts, is_named):
    labels = [f"c{number}" for number, count in enumerate(counts) for _ in range(count)] + [None]
    table = pa.table({"label": pa.array(labels, pa.string())})
    found = find_rare_classes(table, "images")
    assert (found is not None) == is_named
    if is_named:
        assert found.key == "loop.sampling" and "'c0' is right for 95%" in found.line
