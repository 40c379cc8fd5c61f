"""Refusals of the configuration. Each message begins with its dotted key, says what was found and what to do; literal
tables of messages, from pydantic (all of them at once) and from Hydra (the first).
"""

import copy
import pickle

import pytest
from omegaconf import OmegaConf

from tests.in_process import SCRIPTS, compose, load_command, run_command
from utils.config.entry_point import CONF, validate
from utils.config.messages import ConfigError, missing_problems
from utils.config.options import list_options
from utils.config.schema import known_keys
from utils.errors import UserError, close_names

ABSENT = object()


@pytest.fixture(scope="module")
def composed():
    """Values of finetune.py under some choices of groups, composed once each."""
    kept = {}

    def get(*overrides):
        if overrides not in kept:
            kept[overrides] = OmegaConf.to_container(compose("finetune", overrides)[0], resolve=True)
        return copy.deepcopy(kept[overrides])

    return get


def problems_with(values, changes):
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place = values
        for key in path:
            place = place[int(key) if isinstance(place, list) else key]
        if value is ABSENT:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    with pytest.raises(ConfigError) as refused:
        validate(values, load_command("finetune").schema)
    return refused.value.problems


# dotted key, wrong value, the rest of the line: what must hold, and what was found.
MESSAGES = [
    ("seed", "many", "must be a valid integer, found 'many'"),
    ("seed", 1.5, "must be a valid integer, found 1.5"),
    ("loop.global_batch_size", True, "must be a valid integer, found True"),
    ("optim.lr", "1e", "must be a valid number, found '1e'"),
    ("optim.lr", False, "must be a valid number, found False"),
    ("optim.lr", float("nan"), "must be a finite number, found nan"),
    ("model.name", 3, "must be a valid string, found 3"),
    ("dry_run", 1, "must be a valid boolean, found 1"),
    ("optim.layer_decay", 1.5, "must be less than or equal to 1, found 1.5"),
    ("augment.interpolation", "cubic", "must be 'bilinear', 'bicubic', 'lanczos', 'area' or 'varied', found 'cubic'"),
    ("loop", [1], "must be a group of keys, found [1]"),
    ("loop.batch_size", ABSENT, "missing; add loop.batch_size=VALUE or the file of its group"),
    ("optim", ABSENT, "missing; add optim=VALUE or the file of its group"),
    ("optim.name", ABSENT, "missing; add optim.name=VALUE or the file of its group"),
    ("data.root", "???", "must be given; add data.root=VALUE"),
    ("seed", "???", "must be given; add seed=VALUE"),
    ("optim.name", "adamm", "unknown 'adamm'; close: adamw, adan, adamw8bit"),
    ("optim.lrr", 1.0, "unknown key; close: lr"),
    ("sweep.xyzzy", 1, "unknown key; known: at_once, gpus, name, trials"),
    ("optim.drop_path_rate", 0.1, "unknown key; did you mean model.drop_path_rate?"),
    ("optm", {"lr": 1.0}, "unknown key; close: optim, loop"),
    ("runtime.workers", "many", "must be 'auto', or a valid integer, found 'many'"),
    ("runtime.workers", -1, "must be 'auto', or greater than or equal to 0, found -1"),
    ("loop.ema_decay", "high", "must be a valid number, found 'high'"),
    ("optim.betas.1", 2, "must be less than 1, found 2"),
    ("optim.betas", [0.9], "must have at least 2 items, found [0.9]"),
    ("augment.image_size_hw", [32, 32, 3], "must have at most 2 items, found [32, 32, 3]"),
]


@pytest.mark.parametrize(("key", "value", "said"), MESSAGES)
def test_a_message_names_the_key_the_value_and_what_is_allowed(composed, key, value, said):
    assert problems_with(composed(), {key: value}) == [f"{key}: {said}"]


# choices of groups, wrong values, the key that the message of a validator begins with
VALIDATORS = [
    ([], {"augment.crop_scale": [1.0, 0.5]}, "augment.crop_scale"),
    ([], {"augment.std": [0.5]}, "augment.std"),
    ([], {"model.dims": [8, 16]}, "model.dims"),
    ([], {"model.stem_stride": 3}, "model.stem_stride"),
    ([], {"init_weights": "ema"}, "init_weights"),
    (["optim=sgd"], {"optim.momentum": 0.0}, "optim.nesterov"),
    (["optim=sgd"], {"optim.betas": [0.9, 0.9]}, "optim.betas"),
    (["schedule=onecycle"], {"schedule.three_phase": True, "schedule.peak_fraction": 0.6}, "schedule.peak_fraction"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "changes", "key"), VALIDATORS)
def test_a_validator_names_its_key(composed, overrides, changes, key):
    (problem,) = problems_with(composed(*overrides), changes)
    assert problem.startswith(f"{key}: ")


def test_all_errors_are_listed_together(composed):
    problems = problems_with(composed(), {"seed": 1.5, "loop.batch_size": 0, "optim.lrr": 1, "data.root": "???"})
    assert [problem.partition(": ")[0] for problem in problems] == ["data.root", "seed", "loop.batch_size", "optim.lrr"]
    assert str(ConfigError(problems)) == "4 configuration errors\n  " + "\n  ".join(problems)


def test_a_group_of_another_kind_is_one_error(composed):
    other = {"name": "fcmae", "mask_ratio": 0.6, "patch_px": None}
    (problem,) = problems_with(composed(), {"task": other})
    assert problem.startswith("task.name: ") and "'fcmae'" in problem and "classification" in problem


def test_an_integer_does_for_a_number(composed):
    values = composed()
    values["optim"]["lr"] = 1
    assert validate(values, load_command("finetune").schema).optim.lr == 1.0


def test_a_configuration_is_frozen(composed):
    config = validate(composed(), load_command("finetune").schema)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


def test_the_error_survives_pickling():
    """It travels from rank 0 to the others."""
    error = pickle.loads(pickle.dumps(ConfigError(["a: wrong", "b: wrong"])))
    assert isinstance(error, ConfigError) and isinstance(error, UserError)
    assert (error.problems, str(error)) == (["a: wrong", "b: wrong"], "2 configuration errors\n  a: wrong\n  b: wrong")
    assert str(ConfigError(["a: wrong"])) == "1 configuration error\n  a: wrong"


def test_missing_values_are_found_at_every_depth():
    values = {"a": "???", "b": {"c": [1, "???"], "d": None}, "e": "?"}
    assert missing_problems(values) == ["a: must be given; add a=VALUE", "b.c.1: must be given; add b.c.1=VALUE"]


def test_known_keys_are_those_of_the_chosen_kind():
    schema = load_command("finetune").schema
    every = known_keys(schema)
    assert {"seed", "optim", "optim.lr", "optim.betas", "optim.momentum", "loop.sampling"} <= set(every)
    assert len(every) == len(set(every))
    chosen = known_keys(schema, {"optim": {"name": "sgd"}})
    assert "optim.momentum" in chosen and "optim.betas" not in chosen


def test_close_names():
    assert close_names("adamm", ["adamw", "sgd"]) == "close: adamw"
    assert close_names("bogus", ["sgd", "adamw"]) == "known: adamw, sgd"
    many = close_names("bogus", [f"layer{number:03}" for number in range(300)])
    assert many.startswith("known: layer000, layer001, ") and many.endswith(", layer019, ... (300 in all)")


def test_the_options_of_a_group_are_its_files_and_those_below():
    assert {"adamw", "adan", "sgd", "timm"} <= set(list_options("optim", CONF))
    assert "glyphs/demo_finetune" in list_options("experiment", CONF)
    assert list_options("nothing", CONF) == []


# arguments, the key that the message names, what it says besides
FROM_HYDRA = [
    (["optim.lrr=1"], "optim.lrr: ", "close: lr"),
    (["+optim.lrr=1"], "optim.lrr: ", "close: lr"),
    (["loop.lr=1"], "loop.lr: ", "did you mean optim.lr?"),
    (["optm.lr=1"], "optm: ", "close: optim"),
    (["modle=convnextv2_tiny"], "modle: ", "close: model"),
    (["seed.x=3"], "seed.x: ", "seed is a value without keys"),
    (["model=convnextv2_tny"], "model: unknown 'convnextv2_tny'", "close: convnextv2_tiny"),
    (["model=resnet50"], "model: unknown 'resnet50'", "timm has it: model=timm model.name=resnet50"),
    (["experiment=glyphs/demo_fintune"], "experiment: unknown 'glyphs/demo_fintune'", "close: glyphs/demo_finetune"),
    (["tracking=null"], "tracking: ", "jsonl, tensorboard, wandb"),
    (["+optim=adan"], "optim: ", "optim=NAME, one of adamw"),
    (["optim.betas=[0.9"], "optim.betas: '[0.9'", "quotes"),
    (["optim.lr"], "optim.lr: ", "optim.lr=VALUE"),
    (["seed=${nothing}"], "seed: ", "'nothing' not found"),
    (["~optim.lrr"], "Could not delete", "'optim.lrr'"),
    (["--config-name=nothing"], "nothing: ", str(CONF)),
    (["--experimental-rerun=x.pickle"], "--experimental-rerun: ", "pickled"),
    (["--resolve"], "The --resolve flag", "--cfg"),
]


@pytest.mark.parametrize(("arguments", "begins", "said"), FROM_HYDRA)
def test_what_hydra_refuses_names_the_key(arguments, begins, said, tmp_path, monkeypatch, capsys):
    assert run_command("finetune", arguments, tmp_path, monkeypatch) == 2
    printed = capsys.readouterr()
    title, problem = printed.err.splitlines()
    assert title == "finetune.py: 1 configuration error" and problem.startswith(f"  {begins}") and said in problem
    assert printed.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_errors_alike(script, tmp_path, monkeypatch, capsys):
    assert run_command(script, ["+bogus=1"], tmp_path, monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{script}.py: ") and "\n  bogus: unknown key; known: " in err
