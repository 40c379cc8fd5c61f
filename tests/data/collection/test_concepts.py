"""Concepts: the positions of an epoch, the joined table, the folders of sd-scripts, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.collection.collection import describe_concepts
from data.collection.concepts import ConceptConfig, count_positions, find_repeats, share_out
from tests.data.collection.test_collection import listed, load, put
from tests.support import refuses


def concept(path="x", **values):
    return ConceptConfig(path=path, **values)


PRIORS = [{"repeats": 1, "is_prior": True}, {"is_prior": True}]


@pytest.fixture
def opened(tmp_path):
    return lambda root, *concepts, fraction=0.0: load(root, tmp_path / "cache", fraction, concepts=list(concepts))


@pytest.mark.parametrize(
    "concepts, counts, positions",
    [
        ([{"repeats": 10}, {}], [3, 5], [30, 5]),
        ([{"repeats": 10}, {"share": 0.5}], [3, 900], [30, 30]),  # of the epoch; those of 900 take turns
        ([{"repeats": 10}, *PRIORS], [7, 9, 26], [70, 18, 52]),  # as in sd-scripts
        ([{"repeats": 10}, {}, *PRIORS], [2, 10, 100, 20], [20, 10, 25, 5]),
        (PRIORS, [2, 3], [2, 3]),
        ([{"repeats": 1}, {"share": 0.2}, {"share": 0.3}], [7, 4, 4], [7, 3, 4]),  # 14 in all, to whole numbers
        ([{"share": 0.2}, {"share": 0.2}], [10, 40], [40, 40]),  # of each other, until all 40 have occurred
        ([{"share": 0.25}, {"share": 0.75}], [10, 10], [10, 30]),
        ([{"share": 0.0}, {}], [5, 5], [0, 5]),
        ([{}, {}], [0, 5], [0, 5]),
    ],
)
def test_positions_of_an_epoch(concepts, counts, positions):
    assert count_positions([concept(**each) for each in concepts], np.array(counts)).tolist() == positions


def test_largest_remainders_add_up():
    for count in range(30):
        assert share_out(np.array([1.0, 0.0, 3.0, 3.0]), count).sum() == count
    assert share_out(np.array([1.0, 1.0, 1.0]), 5).tolist() == [2, 2, 1] and share_out(np.zeros(2), 3).sum() == 0


@pytest.mark.parametrize(
    "concepts, counts, key",
    [
        ([{"share": 0.0}, {"share": 0.0}], [1, 1], "data.concepts: the shares sum to 0"),
        ([{"share": 0.6}, {"share": 0.4}, {}], [1, 1, 1], "data.concepts: the shares sum to 1;"),
        ([{"share": 0.5}, {}], [0, 1], "data.concepts.0.share: no training image"),
    ],
)
def test_impossible_shares_are_refused(concepts, counts, key):
    with refuses(f"^{key}"):
        count_positions([concept(**each) for each in concepts], np.array(counts))


def test_folders_become_one_table(opened, tmp_path, log):
    """In and outside the root; a concept in another; a prior is not validated; a trigger is a caption without texts."""
    put(tmp_path / "root", "dog/a/a.png", "dog/a/b.png", "dog/in/c.png", "reg/val/d.png", text="a dog")
    put(tmp_path / "else", "e.png", "f.png")
    concepts = [concept("dog", trigger="sks"), concept("dog/in", repeats=2), concept("reg", is_prior=True, share=0.5)]
    concepts.append(concept(str(tmp_path / "else"), trigger="thing", captions={"shuffle": True}))
    collection = opened(tmp_path / "root", *concepts, fraction=0.5)
    other = str(tmp_path / "else")
    assert listed(collection, "path", "concept", "caption") == [
        f"{other}/e.png 3 thing",
        f"{other}/f.png 3 thing",
        "dog/a/a.png 0 a dog",
        "dog/a/b.png 0 a dog",
        "dog/in/c.png 1 a dog",
        "reg/val/d.png 2 a dog",
    ]
    assert collection.concepts == concepts and all(collection.absolute_path(row).is_file() for row in range(6))
    validated = collection.concept_ids()[collection.rows("val")].tolist()
    assert sorted(validated) == [0, 3], "one of two each, none of the prior"
    table = describe_concepts(collection, collection.rows("train"))
    assert " sks 0 " in " ".join(table.split()) and "data.concepts.0.trigger: no caption has 'sks'" in log.text
    changed = opened(tmp_path / "root", *concepts[:3], concept(other, trigger="thing", repeats=9), fraction=0.5)
    assert changed.fingerprint != collection.fingerprint and changed.concepts[3].repeats == 9
    assert opened(tmp_path / "root" / "dog").concepts == []


@pytest.mark.parametrize(
    "concepts, words",
    [
        (["dog", "empty"], ["data.concepts.1.path: ", "holds no image"]),
        (["dog", "none"], ["data.concepts.1.path: ", "does not exist"]),
        (["dog", "./dog/"], ["data.concepts.1.path: ", "twice"]),
        (["dog", "shards"], ["data.concepts: ", "'shards' has shards", "'dog' has files"]),
        (["int", "text"], ["data.concepts: ", "several types"]),
    ],
)
def test_folders_that_make_no_collection_are_refused(concepts, words, opened, tmp_path):
    put(tmp_path, "dog/a.png", "int/a.png", "text/a.png")
    for name in ("empty", "shards"):
        (tmp_path / name).mkdir()
    (tmp_path / "shards/a.tar").write_bytes(b"x" * 9)
    places = {"path": ["a.tar/x.png"], "shard": ["a.tar"], "offset": [0], "length": [9]}
    pq.write_table(pa.table(places), tmp_path / "shards/manifest.parquet")
    for name, value in (("int", 1), ("text", "one")):
        pq.write_table(pa.table({"path": ["a.png"], "score": [value]}), tmp_path / name / "manifest.parquet")
    with refuses(r"^data\.", *words):
        opened(tmp_path, *map(concept, concepts))


@pytest.mark.parametrize(
    "paths, found",
    [
        (["10_sks dog/a.png", "1_cat/b.png"], [("10_sks dog", 10, "sks dog"), ("1_cat", 1, "cat")]),
        (["img/5_sks/a.png", "reg/1_dog/b.png", "log/c.png"], [("img/5_sks", 5, "sks"), ("reg/1_dog", 1, "dog")]),
        (["1_cat/a.png", "2_dog/a.png"], [("1_cat", 1, "cat"), ("2_dog", 2, "dog")]),
        (["10_sks/a.png", "cat/a.png"], []),
        (["10_sks/a.png", "a.png"], []),
        (["10_sks/a.png", ".thumbs/a.png"], [("10_sks", 10, "sks")]),
        (["2024_summer/a.png"], []),
        (["0_sks/a.png", "5_dog/a.png"], [("5_dog", 5, "dog")]),  # sd-scripts leaves the first out
        (["a.png"], []),
    ],
)
def test_folders_of_sd_scripts(paths, found, tmp_path):
    concepts = find_repeats(str(put(tmp_path, *paths)))
    assert [(each.path, each.repeats, each.trigger) for each in concepts] == found
    assert [each.path for each in concepts if each.is_prior] == ["reg/1_dog"] * paths.count("reg/1_dog/b.png")
    (tmp_path / "manifest.csv").write_text("path\n" + paths[0])
    assert find_repeats(str(tmp_path)) == []


def test_folders_that_are_all_left_out_are_refused(tmp_path):
    with refuses("^data.root: 0 repeats leave out all of .*'0_sks'"):
        find_repeats(str(put(tmp_path, "0_sks/a.png")))
