"""predict.py on taggers: literal rows and texts of a made vector of probabilities, and where they are written."""

import io
import os
import shutil

import numpy as np
import pytest
import torch

from data.tags.rules import TextConfig, read_rules
from data.tools.predictions import find_excluded, spell_tags
from models.outputs import OUTPUTS, RowOptions
from models.predictor import Predictor
from tests.in_process import SHORT, SMALL_MODEL, Killed, make_images, run
from tests.support import read_table, refuses, rows, thresholds_of
from utils.config.messages import ConfigError
from utils.formats.spelling import join_tags
from utils.formats.thresholds import write_thresholds
from utils.formats.vocabulary import Vocabulary, write_vocabulary
from utils.io.weights import read_weights, write_weights

# As training leaves it, not in the WD order. Each tag with the probability that the made weights give it.
PROBS = {
    (0, "long_hair"): 0.9, (9, "general"): 0.2, (9, "explicit"): 0.7, (4, "miku_(series)"): 0.8, (0, "^_^"): 0.6,
    (1, "painter"): 0.5, (0, "hat_(x)"): 0.4, (0, "1girl"): 0.95, (4, "rin"): 0.1, (0, "solo"): 0.3,
}  # fmt: skip
KEYS, VALUES = list(PROBS), np.array(list(PROBS.values()), dtype=np.float32)
NAMES, CATEGORIES = [name for _, name in KEYS], np.array([number for number, _ in KEYS])
VOCABULARY = Vocabulary(tuple(NAMES), tuple(CATEGORIES.tolist()), tuple(range(10, 20)), tuple(range(10)))
TEXT = {"order": "score", "max_tags": None, "exclude": [], "categories": False, "rating": None, "spaces": False,
        "escape": False, "separator": ", ", "category_order": [], "first_tags": [], "drop_implied": None,
        "aliases": None}  # fmt: skip
PATHS = [f"val/{name}/{number:03}.png" for name in "AB" for number in range(2)]


def row_of(thresholds=0.35, **options):
    thresholds = np.broadcast_to(np.float32(thresholds), len(NAMES))
    return OUTPUTS["tags"].make_row(VALUES, RowOptions(NAMES, CATEGORIES, True, 1, thresholds, **options))


# ------------------------------------------------------------------------------------------------------ rows and texts


def test_a_row_has_the_rating_and_the_tags_by_category():
    assert row_of(0.5) == {
        "rating": "explicit", "rating_prob": 0.7, "rating_probs": {"general": 0.2, "explicit": 0.7},
        "tags": ["1girl", "long_hair", "miku_(series)", "^_^", "painter"],
        "probs": {"general": {"1girl": 0.95, "long_hair": 0.9, "^_^": 0.6}, "character": {"miku_(series)": 0.8},
                  "artist": {"painter": 0.5}},
    }  # fmt: skip
    assert "rating" not in OUTPUTS["tags"].make_row(VALUES[:1], RowOptions(["a"], np.zeros(1), True, 1, VALUES[:1]))


@pytest.mark.parametrize(
    "options, tags",
    [
        ({"order": "vocabulary"}, ["long_hair", "miku_(series)", "^_^", "painter", "hat_(x)", "1girl"]),
        ({"order": "vocabulary", "max_tags": 2}, ["long_hair", "1girl"]),  # the most probable ones
        ({"thresholds": np.where(CATEGORIES == 4, 0.85, np.where(CATEGORIES == 0, 0.6, np.inf))},
         ["1girl", "long_hair", "^_^"]),
    ],
)  # fmt: skip
def test_which_tags_in_which_order(options, tags):
    assert row_of(**options)["tags"] == tags


def test_ratings_that_no_training_image_had_mean_nothing():
    metadata = {"output": "tags", "tag_names": ["general", "cat"], "tag_categories": [9, 0], "preprocessing": {}}
    for counts, has_ratings in (([3, 7], True), ([0, 7], False)):
        predictor = Predictor({**metadata, "tag_counts": counts}, lambda images, _: np.array([[0.1, 0.9]], np.float32))
        (row,) = predictor.rows(None, predictor.options(1, np.full(2, 0.5)))
        assert ("rating" in row) is has_ratings and row["tags"] == ["cat"]


@pytest.mark.parametrize(
    "config, text",
    [
        ({}, "1girl, long_hair, miku_(series), ^_^, painter, hat_(x)"),
        # Kaomoji keep their underscores.
        ({"spaces": True, "escape": True}, r"1girl, long hair, miku \(series\), ^_^, painter, hat \(x\)"),
        ({"categories": True}, "1girl, long_hair, character:miku_(series), ^_^, artist:painter, hat_(x)"),
        ({"rating": "first", "separator": " | ", "first_tags": ["^_^"]},
         "rating:explicit | ^_^ | 1girl | long_hair | miku_(series) | painter | hat_(x)"),
        ({"rating": "last", "category_order": ["character", "artist"]},
         "miku_(series), painter, 1girl, long_hair, ^_^, hat_(x), rating:explicit"),
        ({"first_tags": ["Hat \\(x\\)", "absent", "^_^"], "category_order": ["character"]},
         "hat_(x), ^_^, miku_(series), 1girl, long_hair, painter"),
        ({"aliases": "1girl,one girl\nlong_hair,^_^\n"}, "one_girl, ^_^, miku_(series), painter, hat_(x)"),
        ({"drop_implied": "miku_(series),long_hair\n^_^,painter\n"},
         "1girl, miku_(series), ^_^, hat_(x)"),
    ],
)  # fmt: skip
def test_the_text_is_arranged(config, text, tmp_path):
    for name in {"aliases", "drop_implied"} & config.keys():
        (tmp_path / "table.csv").write_text(config[name])
        config = {**config, name: str(tmp_path / "table.csv")}
    config = TextConfig(**TEXT | config)
    assert join_tags(spell_tags(row_of(0.35), config, read_rules(config, "text.")), config.separator) == text


def test_excluded_tags_are_found_in_any_spelling(log):
    wanted = ["Long hair", r"hat \(x\)", "character:rin", "artist:solo", "character:1girl", "nothing"]
    found = find_excluded(NAMES, CATEGORIES, wanted)
    assert [name for name, is_excluded in zip(NAMES, found) if is_excluded] == ["long_hair", "hat_(x)", "rin"]
    assert "artist:solo, character:1girl, nothing" in log.text


# ------------------------------------------------------------------------------------------------ in the test's process


def make_table(threshold=0.0):
    """Return thresholds: of categories, and per tag one below its probability."""
    own = {key: threshold or value - 0.01 for key, value in PROBS.items()}
    return thresholds_of(VOCABULARY, {0: 0.62, 1: 0.62, 4: 0.32}, own)


@pytest.fixture(scope="module")
def place(folder):
    """Return a folder with images and two taggers: `made` gives PROBS to each image, `run` looks at them."""
    for file in make_images(folder / "images").rglob("*.png"):
        file.with_suffix(".txt").write_text("1girl")
    write_vocabulary(folder / "tags.csv", VOCABULARY)
    run("finetune", [*SMALL_MODEL, *SHORT, "task=tagging", "task.vocabulary=tags.csv", "data=image_folder",
                     "data.root=images", "run_dir=run", "model.head_init_scale=1.0"], folder)  # fmt: skip
    for file in (folder / "images").rglob("*.txt"):
        file.unlink()
    tensors, metadata = read_weights(folder / "run/weights/best_weights.safetensors")
    bias = torch.logit(torch.from_numpy(VALUES))
    made = {**tensors, "head.weight": torch.zeros_like(tensors["head.weight"]), "head.bias": bias}
    write_weights(folder / "made/weights/best_weights.safetensors", made, metadata)
    rng = torch.Generator().manual_seed(0)
    varied = {**tensors, "head.weight": torch.randn(tensors["head.weight"].shape, generator=rng) * 3, "head.bias": bias}
    write_weights(folder / "run/weights/best_weights.safetensors", varied, metadata)
    return folder


@pytest.fixture
def images(place):
    """Return a copy of the images, which a test may write to."""
    yield shutil.copytree(place / "images", place / "copy")
    shutil.rmtree(place / "copy")


def go(place, output, *words, weights="made", source="copy/val"):
    return run("predict", [f"weights={weights}", f"input={source}", f"output={output}", "device=cpu", *words], place)


def texts(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in sorted(folder.rglob("*.txt"))}


def test_sidecars_are_beside_the_images_or_below_a_folder(place, images, tmp_path):
    (images / "val/A/001.png").write_bytes(b"no image")
    text = "rating:explicit, miku (series), 1girl, ^_^\n"
    words = ["threshold=0.5", "text.spaces=true", "text.rating=first", "text.category_order=[character]",
             "text.exclude=[Long Hair,artist:painter]"]  # fmt: skip
    for output, folder in (("beside", images), (f"{tmp_path}/new/", tmp_path / "new/..")):
        go(place, output, *words)
        assert list(texts(folder).values()) == [text] * 3
    assert list(texts(tmp_path / "new")) == ["A/000.txt", "B/000.txt", "B/001.txt"]
    assert list(texts(images)) == ["val/A/000.txt", "val/B/000.txt", "val/B/001.txt"]
    shutil.copy(images / "val/A/000.png", images / "val/A/000.webp")  # of one stem
    go(place, "beside", "threshold=0.94", "existing=skip", source="copy/val/A")
    assert {"val/A/000.png.txt", "val/A/000.webp.txt"} <= texts(images).keys()


def test_texts_that_are_there_are_kept_merged_or_replaced(place, images):
    ours = images / "val/A/000.txt"
    ours.write_text("\ufeffA girl, 1girl,\n rating:general\n", encoding="utf-8")
    words = ["threshold=0.89", "text.rating=last"]
    with refuses(r"^existing: null"):
        go(place, "beside", *words)
    assert list(texts(images)) == ["val/A/000.txt"]
    assert go(place, "beside", *words, "existing=skip").endswith(": 3 images, 1 there already")
    assert ours.read_text().startswith("\ufeffA girl") and len(texts(images)) == 4
    for _ in range(2):  # again, nothing is new
        go(place, "beside", *words, "existing=append")
        assert ours.read_text() == "A girl, 1girl, rating:general, long_hair, rating:explicit\n"
        assert (images / "val/B/001.txt").read_text() == "1girl, long_hair, rating:explicit\n"
    go(place, "beside", *words, "existing=overwrite")
    assert ours.read_text() == "1girl, long_hair, rating:explicit\n"
    ours.write_bytes(b"\xff")
    with refuses(r"^output: .*000\.txt is not UTF-8"):
        go(place, "beside", *words, "existing=append")


def kill_at_the_third_batch(monkeypatch, place, output, *words):
    name, calls = "embed" if output.endswith(".npz") else "rows", []
    predict = getattr(Predictor, name)

    def fatal(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return predict(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Predictor, name, fatal)
        go(place, output, *words)


@pytest.mark.parametrize("output", ["copy/found.csv", "copy/found.npz", "copy/texts/"])
def test_a_command_that_was_killed_goes_on(output, place, images, monkeypatch):
    words, known = ["existing=skip", "batch_size=1", "threshold=0.5"], {*images.rglob("*")}
    go(place, output, *words, "existing=overwrite")
    whole = {file: file.read_bytes() for file in sorted({*images.rglob("*")} - known) if file.is_file()}
    for file in whole:
        file.unlink()
    kill_at_the_third_batch(monkeypatch, place, output, *words)
    (journal,) = images.rglob(".*journal")
    with open(journal, "a") as stream:
        stream.write("[[[1, 2")  # torn
    assert ": 2 images" in go(place, output, *words)
    assert {file: file.read_bytes() for file in whole} == whole
    assert output.endswith(".npz") or ": 0 images" in go(place, output, *words)


def test_an_image_that_changed_after_the_kill_is_predicted_again(place, images, monkeypatch):
    first, last = (images / path for path in (PATHS[0], PATHS[-1]))
    kill_at_the_third_batch(monkeypatch, place, "beside", "batch_size=1", "threshold=0.5")
    shutil.copy(last, first)
    assert ": 3 images" in go(place, "beside", "batch_size=1", "threshold=0.5")
    assert first.with_suffix(".txt").read_text() == last.with_suffix(".txt").read_text()


def test_nothing_is_written_through_a_link(place, images, tmp_path):
    shutil.copytree(images / "val", tmp_path / "other")
    (images / "link").symlink_to(tmp_path / "other")
    before = texts(tmp_path)
    assert ": 12 images" in go(place, "beside", source="copy")  # which does not follow the link
    assert texts(tmp_path) == before and len(texts(images)) == 12
    with refuses(r"^output: .*copy/link/.* is a link out of "):
        go(place, "beside", "existing=skip", source="copy/*/*/*.png")
    (tmp_path / "secret").write_text("secret")
    (images / "val/A/000.txt").unlink()
    (images / "val/A/000.txt").symlink_to(tmp_path / "secret")
    with refuses(r"^output: .* is a link out of "):
        go(place, "beside", "existing=append", source="copy")
    assert texts(tmp_path) == before and (tmp_path / "secret").read_text() == "secret"


def test_images_are_found_by_list_pattern_and_stdin(place, images, monkeypatch, log):
    wanted = [f"copy/{path}" for path in PATHS]
    for source in ("copy/v*/**/*", f"[{wanted[0]},copy/val/A,copy/val/B/*.png]"):
        go(place, "copy/x.jsonl", source=source)
        assert [row["path"] for row in rows(images / "x.jsonl")] == wanted
    lines = "".join(f"{path}\n" if number else f'"{path}"\r\n' for number, path in enumerate(wanted))  # as Windows does
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    go(place, "copy/texts/", source="-")
    assert list(texts(images / "texts")) == [f"{path[4:-4]}.txt" for path in PATHS]  # below val, which they share
    os.link(images / "val/A/000.png", os.fsencode(images) + b"/val/\xff.png")
    go(place, "copy/x.jsonl")
    assert "1 names that are not UTF-8" in log.text and r": \xff.png" in log.text
    assert [row["path"] for row in rows(images / "x.jsonl")] == wanted


# ---------------------------------------------------------------------------------------------------------- thresholds


def hash_of(place, name):
    return read_weights(place / name / "weights/best_weights.safetensors")[1]["weights_hash"]


def tags_of(place, *words, **where):
    go(place, "x.csv", *words, **where)
    ((rating, tags),) = {(line["rating"], line["tags"]) for line in read_table(place / "x.csv")}
    assert rating == "explicit"
    return tags.split(", ")


ORDERED = sorted((key for key in KEYS if key[0] != 9), key=lambda key: -PROBS[key])


def test_thresholds_beside_a_run_are_used(place, images):
    def above(least, character):
        return [name for number, name in ORDERED if PROBS[number, name] >= (character if number == 4 else least)]

    assert tags_of(place) == above(0.35, 0.35)  # nothing is calibrated
    try:
        made = hash_of(place, "made")
        write_thresholds(place / "made/weights/best_thresholds.csv", make_table(), made)
        assert tags_of(place) == [name for _, name in ORDERED]  # each just above its own
        assert tags_of(place, "profile=balanced") == above(0.62, 0.32)
        assert tags_of(place, "threshold=0.7") == above(0.7, 0.7)
        for word in ("threshold=0.7", "profile=balanced"):
            words = [word, "thresholds.character=0.35", "thresholds.general=0.9"]
            assert tags_of(place, *words) == ["1girl", "long_hair", "miku_(series)"]
        write_thresholds(place / "other.csv", make_table(0.93), made)
        assert tags_of(place, "thresholds=other.csv") == ["1girl"]
        write_thresholds(place / "made/weights/best_thresholds.csv", make_table(), hash_of(place, "run"))
        with refuses(r"^thresholds: .*evaluate\.py calibrate=true$"):
            tags_of(place)
    finally:
        os.unlink(place / "made/weights/best_thresholds.csv")
    with pytest.raises(ConfigError, match="threshold: "):
        tags_of(place, "threshold=0.5", "profile=balanced")


@pytest.fixture(scope="module")
def exported(place):
    """Return the path of a wd14 file of the tagger that looks at images; table.csv has its thresholds."""
    write_thresholds(place / "table.csv", make_table(), hash_of(place, "run"))
    run("export", ["format=wd14", "run_dir=run", "thresholds=table.csv", "output=wd14"], place)
    return "wd14/model.onnx"


def test_an_export_predicts_as_its_run(place, images, exported):
    words = ["thresholds=table.csv", "profile=balanced"]
    go(place, "ours.jsonl", *words, "text.exclude=[painter]", weights="run")  # the file holds no artists
    go(place, "theirs.jsonl", *words, weights=exported)
    counts = set()
    for ours, theirs in zip(rows(place / "ours.jsonl"), rows(place / "theirs.jsonl"), strict=True):
        assert (ours["path"], ours["tags"], ours["rating"]) == (theirs["path"], theirs["tags"], theirs["rating"])
        assert all(probs == pytest.approx(theirs["probs"][name], abs=1e-5) for name, probs in ours["probs"].items())
        counts.add(len(ours["tags"]))
    assert len(counts) > 1  # images that the network tells apart


# --------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_equal_from_a_run_and_from_an_export(place, images, exported):
    (images / "val/B/001.png").write_bytes(b"no image")
    for name, weights in (("ours", "run"), ("theirs", exported)):
        go(place, f"{name}.npz", weights=weights)
    ours, theirs = np.load(place / "ours.npz"), np.load(place / "theirs.npz")
    assert ours["paths"].tolist() == [f"copy/{path}" for path in PATHS[:3]]
    np.testing.assert_allclose(ours["vectors"], theirs["vectors"], atol=1e-4)
    with refuses("^input: no image"):
        go(place, "none.npz", source=f"copy/{PATHS[3]}")
