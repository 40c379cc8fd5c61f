"""Checkpoints: round trips, what damage is noticed, retention, what is written in the background."""

import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine.run.checkpoint import (
    Saver,
    find_checkpoint,
    list_checkpoints,
    read_groups,
    read_state,
    remove_others,
    save_checkpoint,
)
from optim.state import load_optimizer_state, optimizer_state
from tests.support import refuses
from utils.config.entry_point import Job
from utils.io.files import AppendFile, sha256_text
from utils.record.run_folder import RunFolder

STATE = {"config": {"seed": 0}, "fingerprints": {}, "origin": None, "best": {"value": 0.5, "step": 1}, "optimizer": {}}


def make(folder, step, value=1.0):
    tensors = {"task": {"w": torch.full((3, 2), value), "n": torch.tensor(step)}, "optimizer": {"m": torch.ones(2)}}
    path = folder / f"step_{step:08d}"
    save_checkpoint(path, tensors, STATE, {})
    return path


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def replace_state(path, text):
    """Write another state.json into a checkpoint, with a right checksum."""
    (path / "state.json").write_text(text)
    (path / "state.sha256").write_text(sha256_text(text))


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda path: flip_a_bit(path / "task.safetensors"), "task.safetensors does not match its checksum"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda path: flip_a_bit(path / "state.json"), "state.json does not match its checksum"),
        (lambda path: replace_state(path, "[" * 100_000), "it cannot be read (RecursionError"),
        (lambda path: replace_state(path, '{"format": 99}'), "state.json has format 99"),
        (
            lambda path: replace_state(path, json.dumps({**STATE, "format": 2, "step": 20, "checksums": {}})),
            "it cannot be read (KeyError: 'groups')",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(harm, said, tmp_path, log):
    good, newest = make(tmp_path, 10), make(tmp_path, 20)
    harm(newest)
    assert find_checkpoint(tmp_path) == good
    assert f"checkpoint {newest} is damaged: {said}" in log.text


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_zero(tmp_path):
    assert find_checkpoint(tmp_path / "none") is None
    for step in (10, 20):
        flip_a_bit(make(tmp_path, step) / "state.json")
    with refuses("resume: all 2 checkpoints in .* are damaged"):
        find_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = make(tmp_path, 10, value=torch.nan)
    with refuses(r"^resume: .*task\.safetensors has 6 values in w"):
        read_groups(path, read_state(path))


# --- keeping and removing


@pytest.mark.parametrize(
    "there, step, best, left",
    [
        ([10, 20, 30, 40], 40, 10, [10, 30, 40]),
        ([9, 99_999_999, 100_000_000, 123_456_789], 123_456_789, None, [100_000_000, 123_456_789]),
        ([400, 600, 1000, 1200], 600, None, [400, 600]),
    ],
)
def test_retention_keeps_the_newest_and_the_best(there, step, best, left, tmp_path):
    for number in there:
        make(tmp_path, number)
    half = tmp_path / ".step_00000030.tmp-1"
    shutil.copytree(tmp_path / f"step_{step:08d}", half)
    remove_others(tmp_path, step, best)
    assert steps_in(tmp_path) == left and not half.exists()


# --- in the background


def test_what_is_written_is_the_state_of_the_moment_one_write_after_another(tmp_path):
    folder = RunFolder(tmp_path, {"task": {}, "model": {}}, Job("finetune", {}, []))
    saver, go = Saver(folder, SimpleNamespace(loop=SimpleNamespace(checkpoint_mirror=None)), {}), threading.Event()
    weight = torch.ones(4, 3)
    task = SimpleNamespace(origin=None, metadata={})
    runtime, schedule = SimpleNamespace(precision="fp32"), SimpleNamespace(lr=0.1)
    plan = SimpleNamespace(epoch_at=lambda step: 0.5)
    learner = SimpleNamespace(
        step=1, task=task, model=task, exports_average=False, runtime=runtime, schedule=schedule, plan=plan
    )

    def save(last):
        groups = {"weights": {"w": weight}, "optimizer": {}}
        saver.save(learner, groups, {"best": {"step": None}}, lambda: go.wait(20), last=last)

    save(last=False)
    weight.fill_(2.0)  # training goes on, in place
    threading.Timer(0.2, go.set).start()
    learner.step = 2
    save(last=True)
    values = [
        load_file(path / "weights.safetensors")["w"].mean() for path in list_checkpoints(folder.path / "checkpoints")
    ]
    assert values == [1.0, 2.0]


def test_rows_that_the_disk_refuses_come_later_and_in_order(tmp_path, log):
    path = tmp_path / "rows"
    rows = AppendFile(path)
    rows.write("a\n")
    real, rows._file = rows._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (every write: no space left)
    rows.write("b\n")
    rows.write("c\n")
    with pytest.raises(OSError, match="No space left"):
        rows.sync()
    assert path.read_text() == "a\n" and log.text.count("cannot be written (No space left on device)") == 1
    rows._file.close()
    rows._file = real
    rows.write("d\n")
    rows.sync()
    rows.close()
    assert path.read_text() == "a\nb\nc\nd\n"


# --- an optimiser's state


def test_optimiser_state_is_kept_by_name_for_any_groups():
    """A state saved over one grouping comes back over another: names, not positions, say what belongs where."""
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(3)) for name in "abc"}

    def optimizer(*groups):
        made = [{"params": [parameters[name] for name in group], "names": list(group)} for group in groups]
        return torch.optim.AdamW(made, lr=0.1)

    first = optimizer("abc")
    for parameter in parameters.values():
        parameter.grad = torch.randn(3)
    first.step()
    second = optimizer("c", "ba")
    load_optimizer_state(second, *optimizer_state(first), "here")
    for parameter in parameters.values():
        for key, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][key], value)
    with refuses("resume: the optimiser of here has 'c/"):
        load_optimizer_state(optimizer("ab"), *optimizer_state(first), "here")
