"""Every leaf of every primary and of every alternative, given a value of a wrong type, is refused by its dotted key.

That the program reads every leaf: tests/conf/slow_dead_key.py.
"""

import copy

import pytest
import torch
from omegaconf import OmegaConf

from data.augment.transforms import EvalTransform
from engine.tasks.kind import Setup
from engine.tasks.kinds import KINDS
from tests.conf.test_compose import TO
from tests.in_process import SMALL_MODEL, compose, configure, load_command
from utils.config.entry_point import CONF, validate
from utils.config.messages import ConfigError

TAG_WEIGHTS = "{power: 0.5, low: 0.1, high: 3.0, factors: {}, reestimate_steps: 1}"
# Each primary, and of each group of a training script every kind that its union knows.
CONFIGURATIONS = [
    ("pretrain_fcmae", []),
    ("finetune", []),
    ("finetune", ["data=image_folder", "data.root=IMAGES", "model=timm", "optim=adan", "schedule=constant"]),
    ("finetune", ["optim=sgd", "schedule=onecycle"]),
    ("finetune", ["optim=timm", "tracking=tensorboard"]),
    ("finetune", ["tracking=wandb", "tracking.tags=[small]"]),
    ("train", []),
    ("train", ["data=image_folder", "data.root=IMAGES"]),
    ("finetune_sdxl", ["model.path=FOLDER", "data.root=IMAGES", f"task.tag_weights={TAG_WEIGHTS}"]),
    ("finetune_vae", ["model.path=FOLDER", "data.root=IMAGES"]),
    *(("prepare", [f"job={path.stem}", *TO.get(path.stem, [])]) for path in sorted((CONF / "job").glob("*.yaml"))),
    ("prepare", ["data=image_folder", "data.root=IMAGES"]),
    ("evaluate", ["run_dir=RUN"]),
    ("predict", ["weights=RUN", "input=IMAGES", "output=found.csv"]),
    ("export", ["run_dir=RUN"]),
    ("slurm", []),
]


def values_of(script, overrides):
    return OmegaConf.to_container(compose(script, overrides)[0], resolve=True)


def list_leaves(values, path=()):
    """Yield the path of each leaf: scalars, empty groups, lists and their items."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from list_leaves(value, (*path, key))
        return
    yield path
    if isinstance(values, list):
        yield from ((*path, index) for index in range(len(values)))


def replaced(values, path, value):
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def look_up(values, path):
    for key in path:
        values = values[key]
    return values


def problems_of(script, values):
    with pytest.raises(ConfigError) as refused:
        validate(values, load_command(script).schema)
    return refused.value.args


def wrong_value(found):
    if isinstance(found, bool):
        return "true"
    if isinstance(found, int):
        return True
    if isinstance(found, float):
        return float("nan")
    return ["sentinel", 1] if found == {} else {"sentinel": 1}


@pytest.mark.parametrize(("script", "overrides"), CONFIGURATIONS)
def test_a_value_of_a_wrong_type_is_refused_by_its_key(script, overrides):
    values = values_of(script, overrides)
    for path in list_leaves(values):
        found = look_up(values, path)
        dotted, value = ".".join(map(str, path)), wrong_value(found)
        problems = problems_of(script, replaced(values, path, value))
        # A list in place of a value is refused as such or by its items.
        assert any(line.startswith((f"{dotted}: ", f"{dotted}.")) for line in problems), (dotted, value, problems)


@pytest.mark.parametrize(("script", "overrides"), CONFIGURATIONS)
def test_an_unknown_key_is_refused_in_every_group(script, overrides):
    values = values_of(script, overrides)
    groups = {path[:end] for path in list_leaves(values) for end in range(len(path))}
    groups = [path for path in groups if isinstance(look_up(values, path), dict)]
    assert () in groups
    for path in groups:
        if path == ("optim", "extra"):
            continue  # its keys are free, and checked against the optimiser
        problems = problems_of(script, replaced(values, (*path, "bogus"), 1))
        assert [line.partition(";")[0] for line in problems] == [".".join((*path, "bogus")) + ": unknown key"]


# --- leaves that slow_dead_key.py cannot see


def test_mean_and_std_reach_the_network():
    config, _ = configure("finetune", [*SMALL_MODEL, "augment.mean=[0.1,0.2,0.3]", "augment.std=[0.4,0.5,0.6]"])
    setup = Setup(config.model, config.task, config.augment.preprocessing(3), {"class_names": ["a", "b"]})
    task = KINDS[config.task.name].build(setup)
    assert task.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert task.normalise.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_eval_crop_reaches_evaluation():
    config, _ = configure("finetune", ["augment.eval_crop=0.5", "augment.image_size_hw=[8,8]"])
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, 4:12, 4:12] = 200
    assert (EvalTransform(config.augment.preprocessing(3))(image) == 200).all()
    config, _ = configure("finetune", ["augment.eval_resize=squash", "augment.image_size_hw=[16,8]"])
    assert torch.equal(EvalTransform(config.augment.preprocessing(3))(image)[:, :, 0], image[:, :, 0])
