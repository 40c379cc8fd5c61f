"""prepare.py job=import: what the settings of each program become, what is listed, and what is refused."""

import json
from pathlib import Path

import pytest
import yaml

from tests.in_process import configure, run, working_in
from tests.support import refuses

SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"
CASES = yaml.safe_load(Path(__file__).with_name("imports.yaml").read_text())


def convert(folder, text, name="d.toml"):
    """Return the values and the comments of the file that is written."""
    (folder / name).write_text(text)
    run("prepare", ["job=import", f"source={name}", "output=found.yaml"], folder)
    text = (folder / "found.yaml").read_text()
    return yaml.safe_load(text), [line[2:] for line in text.splitlines() if line.startswith("# ")][2:]


def pick(values, key):
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("case", CASES["subsets"])
def test_subsets_become_concepts(case, tmp_path):
    """A subset goes before its dataset, and that before general; a folder in several sizes is trained in each."""
    values, notes = convert(tmp_path, case["text"])
    assert values["data"]["root"] == str(tmp_path / case["root"]) and len(notes) == case["notes"]
    assert {key: pick(values, key) for key in case["wanted"]} == case["wanted"]


@pytest.mark.parametrize("line, key, value", CASES["becomes"])
def test_what_a_key_of_a_dataset_config_becomes(line, key, value, tmp_path):
    assert pick(convert(tmp_path, SUBSET + line)[0], key) == value


@pytest.mark.parametrize("text, note", CASES["listed"])
def test_what_differs_is_listed(text, note, tmp_path):
    _, notes = convert(tmp_path, text)
    assert any(line.startswith(note) for line in notes), notes


@pytest.mark.parametrize("text, words", CASES["refused"])
def test_what_is_refused(text, words, tmp_path):
    with refuses(r"^job\.source: ", *words):
        convert(tmp_path, text)
    assert not (tmp_path / "found.yaml").exists()


@pytest.mark.parametrize("case", CASES["programs"], ids=lambda case: case["file"])
def test_what_the_settings_of_a_program_train(case, tmp_path):
    """The experiment is a valid configuration; no text of it is interpolated."""
    for folder in ("images/a", "images/b"):
        (tmp_path / folder).mkdir(parents=True)
    with working_in(tmp_path):
        convert(tmp_path, case["text"], case["file"])
        config, _ = configure("finetune_sdxl", ["experiment=found.yaml", "data.root=images", "model=sdxl_tiny"])
    values = json.loads(config.model_dump_json())
    layers = values["task"]["lora"]["layers"] if values["task"]["lora"] else {}
    assert {layer["rank"] for layer in layers.values()} == {*case["ranks"]} and len(layers) in (0, 38)
    assert {key: pick(values, key) for key in case["wanted"]} == case["wanted"]
