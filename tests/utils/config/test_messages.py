"""Refusals of the configuration. Each begins with its dotted key, says what was found and what to do: from pydantic all
of them at once, from Hydra the first.
"""

import copy
import functools

import pytest
from omegaconf import OmegaConf

from tests.in_process import compose, load_command, run_command
from utils.config.entry_point import validate
from utils.config.messages import ConfigError

ABSENT = object()


@functools.cache
def composed():
    """Values of finetune.py."""
    return OmegaConf.to_container(compose("finetune", [])[0], resolve=True)


def problems_with(changes):
    values = copy.deepcopy(composed())
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place = values
        for key in path:
            place = place[key]
        if value is ABSENT:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
    with pytest.raises(ConfigError) as refused:
        validate(values, load_command("finetune").schema)
    return list(refused.value.args)


# dotted key, wrong value, the rest of the line: what must hold, and what was found.
MESSAGES = [
    ("optim.lr", float("nan"), "must be a finite number, found nan"),
    ("augment.interpolation", "cubic", "must be 'bilinear' or 'bicubic', found 'cubic'"),
    ("loop", [1], "must be a group of keys, found [1]"),
    ("loop.micro_batch_size", ABSENT, "missing; add loop.micro_batch_size=VALUE or the file of its group"),
    ("data.root", "???", "must be given; add data.root=VALUE"),
    ("optim.name", "adamm", "unknown 'adamm'; close: adamw"),
    ("optm", {"lr": 1.0}, "unknown key; close: optim, optim.lr, optim.opt"),
    ("runtime.workers", -1, "must be 'auto', or greater than or equal to 0, found -1"),
    ("optim.betas.1", 2, "must be less than 1, found 2"),
]


@pytest.mark.parametrize("key, value, said", MESSAGES)
def test_a_message_names_the_key_the_value_and_what_is_allowed(key, value, said):
    assert problems_with({key: value}) == [f"{key}: {said}"]


def test_all_errors_are_listed_together():
    problems = problems_with({"seed": 1.5, "loop.micro_batch_size": 0, "optim.lrr": 1, "data.root": "???"})
    keys = [problem.partition(": ")[0] for problem in problems]
    assert sorted(keys) == ["data.root", "loop.micro_batch_size", "optim.lrr", "seed"]
    assert str(ConfigError(*problems)) == "4 configuration errors\n  " + "\n  ".join(problems)


# The words of a command: the key that begins the message ... what the message says besides.
FROM_HYDRA = {
    "optim.lrr=1": "optim.lrr: ... close: optim.lr",
    "loop.lr=1": "loop.lr: ... optim.lr",
    "sweep.zzzzzzzzzzz=1": "sweep.zzzzzzzzzzz: ... known: sweep.gpus, sweep.name, ",
    "model=convnextv2_tny": "model: unknown 'convnextv2_tny' ... close: convnextv2_tiny",
    "model=resnet50": "model: unknown 'resnet50' ... model=timm model.name=resnet50",
    "tracking=null": "tracking: ... jsonl, tensorboard, wandb",
    "optim=3": "optim: 3 ... known: adafactor",
    "+optim=true": "optim: true ... known: adafactor",
    "schedule=glob(*)": "schedule: glob(*) ... --multirun",
    "schedule=glob(*) --multirun": "schedule: glob(*) ... schedule=A,B",
    "schedule=cosine,constant": "schedule: cosine,constant ... --multirun",
    "optim.lr=choice(1,2)": "optim.lr: choice(1,2) ... --multirun",
    "hydra/launcher=joblib --multirun": "hydra/launcher: ... --help",
    "++hydra.mode=MULTIRUN": "hydra.mode: ... --help",
    "+optim=adan": "Multiple values for optim ... adan",
    "optim.betas=[0.9": "optim.betas: '[0.9' ... quote the option",
    "optim.lr": "optim.lr: ... KEY=VALUE",
    "--lr=1": "--lr: ... close: optim.lr",
    "lr=1": "lr: ... close: optim.lr",
    "seed=${nothing}": "seed: ... 'nothing' not found",
    "seed=${oc.env:HOME}": "seed: ... oc.env",
    "data.root=\udcff": "'data.root': must be UTF-8 ... udcff",
    "sweep.gpus=[] --multirun": "sweep.gpus: ... found []",
}


@pytest.mark.parametrize("command", FROM_HYDRA)
def test_what_hydra_refuses_names_the_key(command, tmp_path, monkeypatch, capsys):
    begins, said = FROM_HYDRA[command].split(" ... ")
    assert run_command("finetune", command.split(), tmp_path, monkeypatch) == 2
    printed = capsys.readouterr()
    title, problem = printed.err.splitlines()
    assert title == "finetune.py: 1 configuration error" and problem.startswith(f"  {begins}") and said in problem
    assert printed.out == "" and not list(tmp_path.iterdir())
