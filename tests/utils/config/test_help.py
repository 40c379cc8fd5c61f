"""--help: it imports nothing slow, says what Hydra composes, and has a meaning for every key and five commands."""

import ast
import re
import shlex

import pytest
import yaml
from omegaconf import OmegaConf

from submit.slurm import split_words
from tests.in_process import SCRIPTS, compose, configure
from tests.support import ROOT, command
from utils.config.entry_point import CONF
from utils.config.help import describe
from utils.config.options import list_options, read_group, read_script
from utils.config.recipe import flatten

FILES = {script: ROOT / ("submit/slurm.py" if script == "slurm" else f"{script}.py") for script in SCRIPTS}
TEXTS = {script: ast.get_docstring(ast.parse(file.read_text()), clean=False) for script, file in FILES.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow_and_has_the_groups_keys_and_examples(script):
    done = command("python", "-X", "importtime", FILES[script], "--help")
    assert done.returncode == 0 and done.stdout == describe(FILES[script], TEXTS[script])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "yaml" in imported and not imported & {"torch", "torchvision", "timm", "pyarrow", "numpy", "hydra"}
    title, _, examples = TEXTS[script].partition("\n")
    assert done.stdout.startswith(title + "\n") and done.stdout.endswith(examples)
    groups, keys = read_script(CONF, script, {})
    shown = [line.strip().partition("  ")[0] for line in done.stdout.splitlines()]
    assert {f"{key}={option.value}" for key, option in (groups | keys).items()} <= set(shown)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_hydra_composes(script):
    values, job = compose(script)
    groups, keys = read_script(CONF, script, {})
    assert {group: option.value for group, option in groups.items() if option.value != "null"} == {
        group: choice for group, choice in job.choices.items() if choice != "None"
    }
    composed = OmegaConf.to_container(values)
    for key, option in keys.items():
        value = composed
        for part in key.split("."):
            value = value[part]
        assert yaml.safe_load(option.value) == value, key
    unknown = {leaf for leaf in flatten(composed) if not any(f"{leaf}.".startswith(f"{key}.") for key in keys)}
    assert unknown <= groups.keys()  # `data: null`


def test_every_key_of_every_file_and_every_group_has_a_meaning():
    for script in SCRIPTS:
        groups, keys = read_script(CONF, script, {})
        assert [key for key, option in (groups | keys).items() if not option.meaning] == []
    for group in ("model", "task", "data", "augment", "optim", "schedule", "loop", "runtime", "tracking"):
        for name in list_options(group, CONF):
            assert [key for key, option in read_group(CONF / group, name).items() if not option.meaning] == [], name


def test_the_keys_are_those_of_the_chosen_files():
    text = describe(FILES["finetune"], TEXTS["finetune"], ["--help", "optim=adan", "data=image_folder", "model=nosuch"])
    assert "  optim=adan " in text and "  optim.betas=[0.98, 0.92, 0.99] " in text
    assert "  data.root=??? " in text and "  augment=finetune_image_folder " in text and "model=convnextv2_atto" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_docstring_have_a_valid_configuration(script):
    lines = TEXTS[script].replace("\\\n", " ").splitlines()
    lines = [re.sub(r"   +[^='].*", "", line.strip()) for line in lines if re.match(" +(python|torchrun) ", line)]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.partition(".py")[2])
        words = split_words(words)[0] if script == "slurm" else words
        if "--multirun" in words:
            words = [word.partition(",")[0] for word in words if word != "--multirun"]
        configure(script, words)
