"""A class that is told by facts of files is named; honest collections are left alone."""

import numpy as np
import pytest

from data.images.measure import FileFacts
from data.validity.shortcuts import find_shortcuts, name_nearest

DRAWS = np.random.default_rng(0)


@pytest.mark.parametrize("fact", ["format", "camera_and_year", "remark"])
def test_facts_of_files_that_tell_the_class(fact):
    labels = np.array(["ill", "well", "ill", ""] * 15)
    sizes = DRAWS.integers(20, 60, (60, 2)).tolist()
    facts = [FileFacts(width=width, height=height) for width, height in sizes]
    facts = [each._replace(**{fact: label}) for each, label in zip(facts, labels)]
    assert [each.key for each in find_shortcuts(facts, labels)] == ["data.root"] * (fact != "remark")


def test_pictures_of_a_patient_name_the_diagnosis():
    patients = np.repeat(np.arange(40), 5)
    pictures = DRAWS.normal(size=(40, 30))[patients] + 0.1 * DRAWS.normal(size=(200, 30))
    labels = DRAWS.integers(0, 2, 40)[patients]
    assert name_nearest(pictures, labels, np.arange(200)) == 1
    assert name_nearest(pictures, labels, patients) < 0.75


def test_fine_detail_of_large_images_that_tells_the_class():
    labels = np.array(["good", "defect"] * 20)
    facts = [FileFacts(width=3000, height=2000 + n, sharpness=5.0 + 10 * (n % 2)) for n in range(40)]
    assert find_shortcuts(facts, labels)[0].key == "augment.image_size_hw"
    assert find_shortcuts([fact._replace(width=100) for fact in facts], labels) == []
