"""What a probe of features reads: rows evenly spread over classes, in literal cases."""

import numpy as np
import pytest

from data.collection.choose import choose_probe_rows

IDS = np.array([2, 0, 1, 0, -1, 2, 0, 1, 2, -1, 0, 3])
TRAIN, VAL = np.arange(0, 8), np.arange(8, 12)


@pytest.mark.parametrize(
    "most, train, val, why",
    [
        (9, [1, 3, 6, 2, 7, 0, 5], [10, 8], "all that have a label, in the order of their classes"),
        (4, [1, 6, 7, 5], [10, 8], "every second one: two of three, one of two, one of two"),
        (3, [3, 2, 0], [10, 8], "of each class one"),
        (2, [3, 0], [8], "two classes, and a validation image of them alone"),
    ],
)
def test_probe_rows_are_spread_over_the_classes(most, train, val, why):
    found = choose_probe_rows(IDS, TRAIN, VAL, most)
    assert [rows.tolist() for rows in found] == [train, val], why
