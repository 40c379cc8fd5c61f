"""A fuzz of the configuration. Every leaf of every script takes nasty values: each is accepted, or refused by its key,
at once. A seeded sample of what is accepted goes through dry_run=true.
"""

import random

import pytest

from tests.conf.test_no_dead_key import CONFIGURATIONS, list_leaves, look_up, replaced, values_of
from tests.in_process import ON_IMAGES, TINY, load_command, make_images, run, run_command
from utils.config.entry_point import validate
from utils.config.messages import ConfigError

NASTY = [
    None, True, -1, 0, 1, 2**64, 10**400, 0.5, 1e308, 1e-300, float("nan"), float("inf"), "", "1e5", "x/" * 3000,
    "a\0b", "..", [], [[1]], [None], [1e-300, 1e308], {}, {"a": {"b": 1}}, {"": 1},
]  # fmt: skip
ALL = [
    "augment.affine={degrees: 5.0, translate: 0.1, scale: [0.9, 1.1], shear_degrees: 5.0}",
    "augment.color_jitter={brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.1}",
    "augment.rand_augment=rand-m9-mstd0.5-inc1",
    "optim=timm",
    "+optim.extra={betas: [0.9, 0.99], eps: 1e-8}",
    "optim.rules=[{match: '*.bias', lr_scale: 0.5, weight_decay: 0.1, freeze_steps: 1}]",
]
# What is run, by script; the files are those of the fixture `place`.
OTHERS = {
    "prepare": ["job=manifest", "data=image_folder", "data.root=images", "dry_run=true"],
    "evaluate": ["run_dir=run", "runtime.device=cpu", "runtime.threads=1", "dry_run=true"],
    "predict": ["weights=run", "input=images", "output=found.csv", "dry_run=true"],
    "export": ["run_dir=run", "dry_run=true"],
}
TRAINED = [*TINY, "data.root=images", "run_dir=fuzzed", "loop.total_steps=3"]


def mutations(script, overrides):
    """Yield each leaf with each nasty value, and the problems that validation finds; none: it is accepted."""
    values, schema = values_of(script, overrides), load_command(script).schema
    for path in list_leaves(values):
        for value in NASTY:
            try:
                validate(replaced(values, path, value), schema)
                yield path, value, []
            except ConfigError as error:
                yield path, value, error.problems


@pytest.mark.parametrize(("script", "overrides"), [*CONFIGURATIONS, ("finetune", ALL)])
def test_a_nasty_value_is_accepted_or_refused_by_its_key(script, overrides):
    for path, value, problems in mutations(script, overrides):
        dotted = ".".join(map(str, path))
        groups = tuple(f"{'.'.join(map(str, path[:end]))}: " for end in range(1, len(path) + 1))
        named = [line for line in problems if dotted in line or line.startswith(groups)]
        assert named or not problems, (dotted, value, problems)


def write(value):
    """Return a value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{write(key)}:{write(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower()


def accepted(script, overrides):
    """Return the overrides of all mutations that validation accepts; an item of a list is set with its list."""
    values, found = values_of(script, overrides), {}
    for path, value, problems in mutations(script, overrides):
        changed = replaced(values, path, value)
        while isinstance(path[-1], int):
            path = path[:-1]
        if not problems:
            found[f"{'.'.join(path)}={write(look_up(changed, path))}"] = None
    return list(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a few images and a run."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_images(folder / "images")
    run("finetune", [*TINY, "data.root=images", "run_dir=run"], folder)
    return folder


@pytest.mark.parametrize("script", [*ON_IMAGES, *OTHERS])
def test_what_is_accepted_can_be_checked(script, place, monkeypatch, capfd):
    base = OTHERS.get(script, [*TRAINED, "dry_run=true"])
    for mutation in random.Random(0).sample(accepted(script, base), 8):
        status = run_command(script, [*base, mutation], place, monkeypatch)
        said = "".join(capfd.readouterr())
        assert status in (0, 2) and "Traceback" not in said, (mutation, status, said[-3000:])
