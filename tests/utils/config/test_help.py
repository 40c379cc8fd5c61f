"""--help: it imports nothing slow and shows the files of conf/; each key there has a meaning, each command is valid."""

import ast
import re
import shlex

import pytest

from submit.slurm import split_words
from tests.conf.test_compose import MANDATORY
from tests.in_process import SCRIPTS, configure
from tests.support import ROOT, command
from utils.config.help import show_help

FILES = {script: ROOT / ("submit/slurm.py" if script == "slurm" else f"{script}.py") for script in SCRIPTS}
TEXTS = {script: ast.get_docstring(ast.parse(file.read_text()), clean=False) for script, file in FILES.items()}


def test_help_imports_nothing_slow():
    done = command("python", "-X", "importtime", FILES["finetune"], "--help")
    assert done.returncode == 0 and done.stdout == show_help(FILES["finetune"], TEXTS["finetune"])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "yaml" in imported and not imported & {"torch", "torchvision", "timm", "pyarrow", "numpy", "hydra"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_docstring_and_the_keys_of_each_file(script):
    text = show_help(FILES[script], TEXTS[script])
    title, _, examples = TEXTS[script].partition("\n")
    assert text.startswith(f"{title}\n{examples.rstrip()}\n")
    config, job = configure(script, MANDATORY.get(script, "").split())
    for group, name in job.choices.items():
        assert f"\n{group}={'null' if name == 'None' else name}  (" in text
    for key, value in config.model_dump().items():
        inner = [key] if not isinstance(value, dict) else value
        assert all(re.search(rf"^ *{name}:", text, re.MULTILINE) for name in inner), key


def test_the_keys_are_those_of_the_chosen_files():
    text = show_help(
        FILES["finetune"], TEXTS["finetune"], ["--help", "optim=adan", "data=image_folder", "model=nosuch"]
    )
    assert "\noptim=adan  (" in text and "  extra: {betas: [0.98, 0.92, 0.99]} " in text
    assert "  root: ??? " in text and "\naugment=finetune_glyphs  (" in text and "\nmodel=convnextv2_atto  (" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_docstring_have_a_valid_configuration(script):
    lines = TEXTS[script].replace("\\\n", " ").splitlines()
    lines = [re.sub(r"   +[^='].*", "", line.strip()) for line in lines if re.match(" +(python|torchrun) ", line)]
    assert len(lines) >= 4
    for line in lines:
        configure_line(line)


def configure_line(line):
    """Check the configuration of a command as documentation has it, such as `python finetune.py init_from=RUN`."""
    before, _, words = line.partition(".py")
    script, words = re.split(r"[\s/]", before)[-1], shlex.split(words)
    words = split_words(words)[0] if script == "slurm" else words
    if "--multirun" in words:
        words = [word.partition(",")[0] for word in words if not re.search(r"^--multirun|[\[(]", word)]
    configure(script, words)
