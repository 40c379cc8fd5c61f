"""Refusals of the configuration. Each message begins with its dotted key, says what was found and what to do; literal
tables of messages, from pydantic (all of them at once) and from Hydra (the first).
"""

import copy
import pickle

import pytest
from omegaconf import OmegaConf

from tests.in_process import SCRIPTS, compose, load_command, run_command
from utils.config.entry_point import CONF, validate
from utils.config.messages import ConfigError, known_keys, list_options, missing_problems
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


MESSAGES = {
    "a wrong type": ({"seed": "many"}, "seed: must be a valid integer, found 'many'"),
    "a text for a number": ({"optim.lr": "1e"}, "optim.lr: must be a valid number, found '1e'"),
    "a number for a text": ({"model.name": 3}, "model.name: must be a valid string, found 3"),
    "a fraction for an integer": ({"seed": 1.5}, "seed: must be a valid integer, found 1.5"),
    "a bool for an integer": ({"loop.batch_size": True}, "loop.batch_size: must be a valid integer, found True"),
    "a bool for a number": ({"optim.lr": False}, "optim.lr: must be a valid number, found False"),
    "an integer for a bool": ({"dry_run": 1}, "dry_run: must be a valid boolean, found 1"),
    "NaN": ({"optim.lr": float("nan")}, "optim.lr: must be a finite number, found nan"),
    "infinity": ({"optim.eps": float("inf")}, "optim.eps: must be a finite number, found inf"),
    "below its bound": ({"loop.batch_size": 0}, "loop.batch_size: must be greater than or equal to 1, found 0"),
    "above its bound": ({"optim.layer_decay": 1.5}, "optim.layer_decay: must be less than or equal to 1, found 1.5"),
    "an unknown choice": (
        {"augment.interpolation": "cubic"},
        "augment.interpolation: must be 'bilinear' or 'bicubic', found 'cubic'",
    ),
    "a value for a group": ({"optim": 3}, "optim: must be a group of keys, found 3"),
    "a list for a group": ({"loop": [1]}, "loop: must be a group of keys, found [1]"),
    "missing": (
        {"loop.batch_size": ABSENT},
        "loop.batch_size: missing; add loop.batch_size=VALUE or the file of its group",
    ),
    "a missing group": ({"optim": ABSENT}, "optim: missing; add optim=VALUE or the file of its group"),
    "a missing tag": ({"optim.name": ABSENT}, "optim.name: missing; add optim.name=VALUE or the file of its group"),
    "??? for a text": ({"data.root": "???"}, "data.root: must be given; add data.root=VALUE"),
    "??? for a number": ({"seed": "???"}, "seed: must be given; add seed=VALUE"),
    "an unknown tag": ({"optim.name": "adamm"}, "optim.name: unknown 'adamm'; close: adamw, adan"),
    "an unknown key": ({"optim.lrr": 1.0}, "optim.lrr: unknown key; close: lr"),
    "an unknown key near nothing": (
        {"sweep.xyzzy": 1},
        "sweep.xyzzy: unknown key; known: at_once, gpus, name, trials",
    ),
    "a key of another group": (
        {"optim.drop_path_rate": 0.1},
        "optim.drop_path_rate: unknown key; did you mean model.drop_path_rate?",
    ),
    "a key of many other groups": (
        {"loop.name": "x"},
        "loop.name: unknown key; did you mean optim.name or sweep.name or model.name?",
    ),
    "an unknown group": ({"optm": {"lr": 1.0}}, "optm: unknown key; close: optim, loop"),
    "auto or an integer: a text": (
        {"runtime.workers": "many"},
        "runtime.workers: must be 'auto', or a valid integer, found 'many'",
    ),
    "auto or an integer: a bool": (
        {"runtime.workers": True},
        "runtime.workers: must be 'auto', or a valid integer, found True",
    ),
    "auto or an integer: a bound": (
        {"runtime.workers": -1},
        "runtime.workers: must be 'auto', or greater than or equal to 0, found -1",
    ),
    "auto or a bool": ({"runtime.compile": 1}, "runtime.compile: must be 'auto', or a valid boolean, found 1"),
    "a number or null": ({"loop.ema_decay": "high"}, "loop.ema_decay: must be a valid number, found 'high'"),
    "an item of a list": ({"optim.betas.1": 2}, "optim.betas.1: must be less than 1, found 2"),
    "an item's type": ({"model.depths.0": 2.5}, "model.depths.0: must be a valid integer, found 2.5"),
    "a list too short": ({"optim.betas": [0.9]}, "optim.betas: must have at least 2 items, found [0.9]"),
    "a list too long": (
        {"augment.image_size_hw": [32, 32, 3]},
        "augment.image_size_hw: must have at most 2 items, found [32, 32, 3]",
    ),
    "a value in a free group": (
        {"schedule.knobs.ema": {"start": 0.0, "phases": [{"to": 1.0, "curve": "bent"}]}},
        "schedule.knobs.ema.phases.0.curve: must be 'cosine' or 'linear', found 'bent'",
    ),
    "validators: ranges": (
        {"augment.crop_scale": [1.0, 0.5]},
        "augment.crop_scale: 1 to 0.5 does not rise; give the smaller number first",
    ),
    "validators: channels": (
        {"augment.std": [0.5]},
        "augment.std: 1 numbers beside 3 in augment.mean; give one per channel",
    ),
    "validators: stages": (
        {"model.dims": [8, 16]},
        "model.dims: 2 widths [8, 16] for 4 stages (model.depths=[2, 2, 6, 2]); set one width for each stage",
    ),
    "validators: a field": ({"model.stem_stride": True}, "model.stem_stride: must be 1, 2 or 4 (an integer), not True"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_message_begins_with_its_key(composed, case):
    changes, message = MESSAGES[case]
    assert problems_with(composed(), changes) == [message]


CHOSEN = {
    "momentum": (
        ["optim=sgd"],
        {"optim.momentum": 0.0},
        "optim.nesterov: true needs optim.momentum above 0; set optim.momentum=0.9",
    ),
    "optimiser": (
        ["optim=timm"],
        {"optim.opt": "lam"},
        "optim.opt: unknown timm optimiser 'lam'; close: lamb, lambw, lambc",
    ),
    "argument": (
        ["optim=timm"],
        {"optim.opt": "lamb", "optim.extra": {"bets": [0.9]}},
        "optim.extra.bets: lamb takes no such argument; close: betas, eps",
    ),
    "momentum schedule": (
        ["optim=timm", "schedule=onecycle"],
        {"optim.opt": "rmsproptf"},
        "schedule.cycle_momentum: true moves beta1, which timm's rmsproptf does not have; set "
        "schedule.cycle_momentum=false, or another optimiser, such as optim=sgd, optim=adamw or optim=muon",
    ),
    "an average of nothing": (
        [],
        {"init_weights": "ema"},
        "init_weights: ema, but init_from is null, so that no weights are read; set init_from=RUN_OR_FILE, or "
        "init_weights=model",
    ),
    "a cycle of three phases": (
        ["schedule=onecycle"],
        {"schedule.three_phase": True, "schedule.peak_fraction": 0.6},
        "schedule.peak_fraction: 0.6 leaves no time for the way down of schedule.three_phase=true, which is as long as "
        "the way up; set at most 0.5",
    ),
    "a key of another kind": (["optim=sgd"], {"optim.betas": [0.9, 0.9]}, "optim.betas: unknown key; close: base_lr"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_a_message_about_a_choice(composed, case):
    overrides, changes, message = CHOSEN[case]
    assert problems_with(composed(*overrides), changes) == [message]


def test_all_errors_are_listed_together(composed):
    problems = problems_with(composed(), {"seed": 1.5, "loop.batch_size": 0, "optim.lrr": 1, "data.root": "???"})
    assert problems == [
        "data.root: must be given; add data.root=VALUE",
        "seed: must be a valid integer, found 1.5",
        "loop.batch_size: must be greater than or equal to 1, found 0",
        "optim.lrr: unknown key; close: lr",
    ]
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
    assert len(every) == len(set(every)) and "schedule.knobs.start" not in every
    chosen = known_keys(schema, {"optim": {"name": "sgd"}})
    assert "optim.momentum" in chosen and "optim.betas" not in chosen
    named = known_keys(schema, {"schedule": {"knobs": {"temperature": {"start": 1.0}}}})
    assert {"schedule.knobs.temperature", "schedule.knobs.temperature.start"} <= set(named)


def test_close_names():
    assert close_names("adamm", ["adamw", "sgd"]) == "close: adamw"
    assert close_names("bogus", ["sgd", "adamw"]) == "known: adamw, sgd"
    many = close_names("bogus", [f"layer{number:03}" for number in range(300)])
    assert many.startswith("known: layer000, layer001, ") and many.endswith(", layer019, ... (300 in all)")


def test_the_options_of_a_group_are_its_files_and_those_below():
    assert {"adamw", "adan", "sgd", "timm"} <= set(list_options("optim", CONF))
    assert "glyphs/demo_finetune" in list_options("experiment", CONF)
    assert list_options("nothing", CONF) == []


FROM_HYDRA = {
    "an unknown key": (["optim.lrr=1"], "optim.lrr: unknown key; close: lr"),
    "an unknown key, added": (["+optim.lrr=1"], "optim.lrr: unknown key; close: lr"),
    "a key of another group": (["loop.lr=1"], "loop.lr: unknown key; did you mean optim.lr?"),
    "a misspelt group": (["optm.lr=1"], "optm.lr: unknown key; did you mean optim.lr?"),
    "a misspelt choice of group": (["modle=convnextv2_tiny"], "modle: unknown key; close: model"),
    "a key of a group with free keys": (
        ["schedule.knobs.temperature={start: 1.0, phases: []}"],
        "schedule.knobs.temperature: unknown key; schedule.knobs takes new keys with a plus: "
        "+schedule.knobs.temperature=VALUE",
    ),
    "a misspelt key of a free key": (
        ["+schedule.knobs.temperature={start: 1.0, strat: 1.0, phases: []}"],
        "schedule.knobs.temperature.strat: unknown key; close: start",
    ),
    "a key below a value": (["seed.x=3"], "seed.x: unknown key; seed is a value without keys"),
    "an unknown option": (
        ["model=convnextv2_tny"],
        "model: unknown 'convnextv2_tny'; close: convnextv2_tiny, convnextv2_nano, convnextv2_atto (files of "
        f"{CONF}/model)",
    ),
    "an unknown experiment": (
        ["experiment=glyphs/demo_fintune"],
        "experiment: unknown 'glyphs/demo_fintune'; close: glyphs/demo_finetune, glyphs/demo_pretrain, "
        "glyphs/best (files of "
        f"{CONF}/experiment)",
    ),
    "no option": (
        ["tracking=null"],
        "tracking: null chooses no file; leave it out, or choose jsonl, tensorboard, wandb",
    ),
    "a second option": (["+optim=adan"], "optim: is chosen already; write optim=NAME, without +"),
    "a value that is not read": (
        ["optim.betas=[0.9"],
        "optim.betas: '[0.9' cannot be read; put special characters in quotes: optim.betas='\"a, b\"'",
    ),
    "no value": (["optim.lr"], "optim.lr: no value is given; write optim.lr=VALUE"),
    "an interpolation of nothing": (["seed=${nothing}"], "seed: Interpolation key 'nothing' not found"),
    "a removed key that is not there": (["~optim.lrr"], "optim.lrr: unknown key; close: lr"),
    "a primary file that is not there": (["--config-name=nothing"], f"nothing: no such file in {CONF}"),
    "an option that reads a pickle": (
        ["--experimental-rerun=x.pickle"],
        "--experimental-rerun: reads a pickled file, which Atelier never does; give the overrides",
    ),
    "a flag without its other": (
        ["--resolve"],
        "The --resolve flag can only be used in conjunction with --cfg or --help",
    ),
}


@pytest.mark.parametrize("case", FROM_HYDRA)
def test_what_hydra_refuses_is_reported_in_our_words(case, tmp_path, monkeypatch, capsys):
    arguments, message = FROM_HYDRA[case]
    assert run_command("finetune", arguments, tmp_path, monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.err == f"finetune.py: 1 configuration error\n  {message}\n" and printed.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_errors_alike(script, tmp_path, monkeypatch, capsys):
    assert run_command(script, ["+bogus=1"], tmp_path, monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{script}.py: ") and "\n  bogus: unknown key; known: " in err
