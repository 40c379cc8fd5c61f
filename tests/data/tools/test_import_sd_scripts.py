"""prepare.py job=import: what each key of sd-scripts becomes, what is listed, and what is refused."""

import pytest
import yaml

from tests.in_process import run
from tests.support import refuses

SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"


def convert(folder, text):
    """Return the values and the comments of the file that is written."""
    (folder / "d.toml").write_text(text)
    run("prepare", ["job=import", "source=d.toml", "output=found.yaml"], folder)
    text = (folder / "found.yaml").read_text()
    return yaml.safe_load(text), [line[2:] for line in text.splitlines() if line.startswith("# ")][2:]


def test_a_subset_goes_before_its_dataset_and_that_before_general(tmp_path):
    text = """
        [general]
        keep_tokens = 1
        shuffle_caption = true
        [[datasets]]
        resolution = [1024, 832]
        enable_bucket = true
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = 'x/10_sks'
        class_tokens = 'sks dog'
        num_repeats = 10
        [[datasets.subsets]]
        image_dir = 'x/y'
        keep_tokens = 3
        caption_dropout_rate = 0.1
        alpha_mask = true
        [[datasets.subsets]]
        image_dir = 'reg'
        is_reg = true
    """
    values, notes = convert(tmp_path, text)
    first, second, prior = values["data"]["concepts"]
    assert values["data"]["root"] == str(tmp_path) and values["data"]["validation_fraction"] == 0 and notes == []
    own = {"keep_first": 2, "caption_dropout": 0.0}
    whole = {"path": "x/10_sks", "repeats": 10, "trigger": "sks dog", "is_prior": False}
    assert first == {**whole, "captions": own, "mask": False}
    assert second["captions"] == {"keep_first": 3, "caption_dropout": 0.1} and second["mask"] is True
    assert values["task"]["mask"] == {"source": "alpha", "floor": 0.0, "normalise": False}
    assert prior["repeats"] == 1 and prior["is_prior"] and values["task"]["captions"]["shuffle"] is True
    limits = {"areas_px": [1024 * 832], "step_px": 64, "min_px": 256, "max_px": 1024}
    assert values["task"]["buckets"] == {
        "max_crop": 1.0,
        "assign": "no_upscale",
        "flip": 0.0,
        "crop": "centre",
        **limits,
    }


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("flip_aug = true", "task.buckets.flip", 0.5),
        ("random_crop = true", "task.buckets.crop", "random"),
        ("resolution = 512", "task.buckets.sizes_hw", [[[512, 512]]]),
        ("resolution = [480, 512]", "task.buckets.sizes_hw", [[[512, 480]]]),
        ("enable_bucket = true\nbucket_no_upscale = true", "task.buckets.small", "native"),
        ("enable_bucket = true\nbucket_reso_steps = 32", "task.buckets.step_px", 32),
        ("enable_wildcard = true", "task.captions.lines", "one_of"),
        ("caption_tag_dropout_rate = 0.2", "task.captions.tag_dropout", 0.2),
        ("caption_prefix = 'a, b, '\nkeep_tokens = 3", "task.captions.prefix", "a, b"),
        ("caption_prefix = 'a, b, '\nkeep_tokens = 3", "task.captions.keep_first", 1),
        ("caption_prefix = 'a photo of'\nkeep_tokens = 1", "task.captions.prefix", "a photo of "),
        ("caption_prefix = 'a photo of'\nkeep_tokens = 1", "task.captions.keep_first", 1),
        ("caption_suffix = 'by me'", "task.captions.suffix", " by me"),
        ("keep_tokens_separator = '|||'\ncaption_suffix = ', c ||| d'", "task.captions.suffix", "c, d"),
        ("batch_size = 6", "task.chunk", 6),
        ("validation_split = 0.2", "data.validation_fraction", 0.2),
    ],
)
def test_what_a_key_becomes(line, key, value, tmp_path):
    found, _ = convert(tmp_path, SUBSET + line)
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    "text, note",
    [
        (SUBSET + "color_aug = true", "color_aug=True: has no counterpart"),
        (f"[general]\nsecondary_separator = ';'\n{SUBSET}", "secondary_separator=';': has no counterpart"),
        (SUBSET + "metadata_file = 'm.json'", "metadata_file='m.json': meta_*.json"),
        (f"{SUBSET}flip_aug = true\n[[datasets.subsets]]\nimage_dir = 'b'", "flip_aug: True for all"),
        (f"{SUBSET}resolution = 512\n{SUBSET}", "image_dir: of a folder that is there several times"),
        (SUBSET + "shuffle_caption = true\ncaption_prefix = 'a'", "caption_prefix, caption_suffix: stay"),
    ],
)
def test_what_differs_is_listed(text, note, tmp_path):
    _, notes = convert(tmp_path, text)
    assert any(line.startswith(note) for line in notes), notes


def test_a_folder_in_several_resolutions_is_trained_in_each(tmp_path):
    values, _ = convert(
        tmp_path, f"[general]\nenable_bucket = true\n{SUBSET}resolution = 512\n{SUBSET}resolution = 768"
    )
    assert values["task"]["buckets"]["areas_px"] == [512**2, 768**2] and values["task"]["buckets"]["assign"] == "all"
    assert len(values["data"]["concepts"]) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        (SUBSET + "num_repeat = 3", ["a: num_repeat: unknown key", "num_repeats"]),
        (f"[general]\nkeep_token = 3\n{SUBSET}", ["a: keep_token: unknown key", "keep_tokens"]),
        (SUBSET + "keep_tokens = 'x'", ["a: keep_tokens: must be"]),
        ("[[datasets]]\n[[datasets.subsets]]\nis_reg = true", ["image_dir: missing"]),
        ("[general]", ["no subset"]),
        (SUBSET + "num_repeats = 0", ["no subset"]),  # as sd-scripts leaves it out
        ("datasets = 3", ["not a readable"]),
        ("a = [", ["not a readable"]),
        (SUBSET + "[network]\ndim = 4", ["network"]),
    ],
)
def test_what_is_refused(text, words, tmp_path):
    with refuses(r"^job\.source: ", *words):
        convert(tmp_path, text)
    assert not (tmp_path / "found.yaml").exists()
