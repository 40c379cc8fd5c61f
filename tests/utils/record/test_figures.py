"""Classes of unequal sizes."""

from utils.record.figures import is_unequal


def test_classes_of_unequal_sizes():
    assert is_unequal([285, 15]) and is_unequal([75, 25]) and is_unequal([30, 10, 10, 10])
    assert not any(map(is_unequal, ([60, 40], [10] * 9)))
