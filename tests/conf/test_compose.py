"""Composition of every file of conf/. Each primary, each option of each group and each experiment composes, validates
against its script's schema, and its task builds on the meta device.
"""

import re

import numpy as np
import pytest

from tests.in_process import SCRIPTS, TASKS, TRAINING, configure, draw_few_glyphs, run
from tests.support import read_conf
from utils.config.help import CONF, list_options
from utils.config.messages import ConfigError

# What must be given, by script; a test that needs the files behind them makes its own.
MANDATORY = {
    "predict": "weights=RUN input=IMAGES output=found.csv",
    "evaluate": "run_dir=RUN",
    "export": "run_dir=RUN",
    "finetune_sdxl": "model.path=FOLDER data.root=PATH",
    "finetune_vae": "model.path=FOLDER data.root=PATH",
}
# What jobs must be given.
TO = {
    "evaluate": "job.run_dir=RUN",
    "compare": "job.models=[A,B] data.root=IMAGES",
    "import": "job.source=IN job.output=OUT",
    "vocabulary": "job.output=X",
    "pack": "job.output=X",
    "copy": "job.to=X",
}
SHARED = {"common", "optim/_every", "task/_buckets"}  # files that others include
# For the few images of these tests, which have classes and tags; timm knows its networks without their weights.
SMALL = {"tagging": ["task.min_count=1"], "regression": ["data.columns={target: size}"]}


def list_yaml(folder):
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def groups_of(script):
    defaults = read_conf(script).get("defaults", [])
    return [group for item in defaults if isinstance(item, dict) for group in item if (CONF / group).is_dir()]


# Each option of each group once, with a script that takes it.
OPTIONS = {
    (group, name): script
    for script in (*SCRIPTS, *reversed(TRAINING))
    for group in groups_of(script)
    for name in list_options(group, script)
    if group != "experiment"
}
BASES = [name for name in list_yaml(CONF / "experiment") if name.startswith("base/")]  # of families of recipes
FOLDERS = ("imagenet", "imagenet22k", "small_data")  # test_recipes.py composes and builds their experiments
EXPERIMENTS = [name for name in list_yaml(CONF / "experiment") if name not in BASES]
OTHERS = [name for name in EXPERIMENTS if name.split("/")[0] not in FOLDERS]


@pytest.fixture(scope="module")
def glyphs(folder):
    return draw_few_glyphs(folder / "glyphs")


def script_of(experiment):
    """The script of an experiment, as the command in its header states it."""
    text = (CONF / f"experiment/{experiment}.yaml").read_text()
    return re.search(rf"^#.*python (\w+)\.py experiment={experiment}\b", text, re.MULTILINE).group(1)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Draw no samples, which takes a second: tests/engine/test_seen.py."""
    monkeypatch.setattr("engine.run.first_samples.draw_first_samples", lambda *arguments: np.zeros((1, 1, 3), np.uint8))


def test_each_kind_is_listed_by_the_help_of_its_scripts():
    listed = {name: tuple(script for script in TRAINING if name in list_options("task", script)) for name in TASKS}
    assert listed == {name: tuple(sorted(scripts)) for name, scripts in TASKS.items()}


def test_no_file_is_passed_over():
    covered = {f"{group}/{name}" for group, name in OPTIONS}
    everything = {*SCRIPTS, *SHARED, *covered, *(f"experiment/{name}" for name in (*EXPERIMENTS, *BASES))}
    assert set(list_yaml(CONF)) == everything


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_primary_file_validates_and_refuses_what_is_not_given(script):
    given = MANDATORY.get(script, "").split()
    configure(script, given)
    for left_out in given:
        with pytest.raises(ConfigError) as refused:
            configure(script, [override for override in given if override != left_out])
        assert [text.partition(": must be given")[0] for text in refused.value.args] == [left_out.partition("=")[0]]


@pytest.mark.parametrize("group, name", OPTIONS)
def test_an_option_of_a_group_builds(group, name, glyphs, tmp_path):
    script = OPTIONS[group, name]
    overrides = [f"{group}={name}"]
    if script not in TRAINING:
        given = TO.get(name, "") if group == "job" else MANDATORY.get(script, "")
        configure(script, [*overrides, *given.split(), *(["data.root=IMAGES"] if group == "data" else [])])
        return
    overrides += [f"data.root={glyphs}", "dry_run=true", "runtime.device=cpu", *SMALL.get(name, [])]
    if script in ("finetune_sdxl", "finetune_vae"):
        overrides += ["model.path=null"] if name == "sdxl" else ["model=sdxl_tiny"]
    assert run(script, overrides, tmp_path).startswith("dry run: ")
    written = {file.name for script in TRAINING for file in tmp_path.glob(f"outputs/{script}/*/**/*.*")}
    buckets = {"buckets.csv"} if script in ("finetune_sdxl", "finetune_vae") else set()
    assert written == {"samples_seen.png"} | buckets


@pytest.mark.parametrize("name", OTHERS)
def test_an_experiment_builds_with_the_script_that_its_header_names(name, glyphs, tmp_path):
    overrides = [f"experiment={name}", f"data.root={glyphs}", "dry_run=true", "runtime.device=cpu"]
    if name.startswith("sdxl/"):
        overrides.append("model=sdxl_tiny")
    if "tagger" in name:
        overrides += SMALL["tagging"]
    assert run(script_of(name), overrides, tmp_path).startswith("dry run: ")
