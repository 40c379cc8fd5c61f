"""Checkpoints: round trips, what damage is noticed, retention, and what is written in the background."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from engine.checkpoint import (
    Writer,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    move_aside_beyond,
    read_groups,
    read_state,
    remove_old,
    save_checkpoint,
)
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.groups import build_groups
from optim.state import load_optimizer_state, optimizer_state
from utils.config.help import CONF
from utils.errors import UserError
from utils.io.files import AppendFile, sha256_text


def make(folder, step, value=1.0):
    tensors = {"task": {"w": torch.full((3, 2), value), "n": torch.tensor(step)}, "optimizer": {"m": torch.ones(2)}}
    return save_checkpoint(folder, step, tensors, {"config": {"seed": 0}, "best": {"value": 0.5, "step": 1}}, {})


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


def test_what_is_saved_comes_back(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {"task": {"a": shared, "b": shared[1], "c": shared.t(), "last": last}, "optimizer": {}}
    path = save_checkpoint(tmp_path, 7, tensors, {"best": {"value": 0.1 + 0.2, "step": 3}}, {})
    state = read_state(path)
    assert state["step"] == 7 and state["best"] == {"value": 0.1 + 0.2, "step": 3}
    groups = read_groups(path, state)
    assert all(torch.equal(groups["task"][name], tensor) for name, tensor in tensors["task"].items())
    assert groups["optimizer"] == {}  # plain SGD has no state
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.sha256", "task.safetensors"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: flip_a_bit(path / "task.safetensors"), "task.safetensors does not match its checksum"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda path: flip_a_bit(path / "state.json"), "state.json does not match its checksum"),
        (lambda path: replace_state(path, "[" * 100_000), "it cannot be read (RecursionError"),
        (lambda path: replace_state(path, '{"format": 99}'), "state.json has format 99"),
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
    with pytest.raises(UserError, match="resume: all 2 checkpoints in .* are damaged"):
        find_checkpoint(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = make(tmp_path, 10, value=torch.nan)
    with pytest.raises(UserError, match=r"^resume: .*task\.safetensors has 6 values in w"):
        read_groups(path, read_state(path))


# --- keeping and removing


def test_a_half_written_checkpoint_is_none_and_is_removed_later(tmp_path):
    half = tmp_path / ".step_00000030.tmp-1"
    shutil.copytree(make(tmp_path, 10), half)
    assert steps_in(tmp_path) == [10]
    remove_old(tmp_path, keep=2, step=10, best_step=None)
    assert not half.exists()


@pytest.mark.parametrize(
    ("there", "keep", "step", "best", "left"),
    [
        ([10, 20, 30, 40], 2, 40, 10, [10, 30, 40]),
        ([1200, 1300, 1400], 1, 1300, None, [1300, 1400]),
        ([9, 99_999_999, 100_000_000, 123_456_789], 2, 123_456_789, None, [100_000_000, 123_456_789]),
        ([400, 600, 1000, 1200], 2, 600, None, [400, 600, 1000, 1200]),
    ],
)
def test_retention_keeps_the_newest_the_best_and_those_beyond_the_one_just_saved(
    there, keep, step, best, left, tmp_path
):
    for number in there:
        make(tmp_path, number)
    remove_old(tmp_path, keep=keep, step=step, best_step=best)
    assert steps_in(tmp_path) == left


def test_checkpoints_beyond_are_hidden_until_the_next_save(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    flip_a_bit(tmp_path / "step_00000030/task.safetensors")
    move_aside_beyond(tmp_path, 10)
    (hidden,) = tmp_path.glob(".step_00000020*")
    assert steps_in(tmp_path) == [10] and find_damage(hidden) is None  # whole: it may be renamed back
    make(tmp_path, 20)
    move_aside_beyond(tmp_path, 10)  # by a process of the same number
    make(tmp_path, 15)
    remove_old(tmp_path, keep=1, step=15, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000015"]


# --- in the background


def groups(value):
    return {"task": {"w": torch.full((4, 3), value)}, "optimizer": {}}


class Held:
    """A write that takes until it is let go."""

    def __init__(self):
        self.seen, self.go = [], threading.Event()

    def __call__(self, given):
        assert self.go.wait(20)
        self.seen.append(float(given["task"]["w"][0, 0]))


def test_what_is_written_is_the_state_of_the_moment_one_write_after_another():
    writer, held, order, state = Writer(), Held(), [], groups(1.0)
    writer.submit(state, held, "saved")
    state["task"]["w"].fill_(2.0)  # training goes on, in place
    kept = writer._kept["task", "w"].data_ptr()
    threading.Timer(0.2, held.go.set).start()
    writer.submit(state, lambda given: order.append(float(given["task"]["w"].sum())), "saved")
    assert held.seen == [1.0]
    writer.wait(last=True)
    assert order == [24.0] and writer._kept["task", "w"].data_ptr() == kept  # memory is used again


@pytest.mark.parametrize("error", [UserError("run_dir: /x does not take it"), KeyError("a defect")])
def test_a_failed_write_is_logged_and_the_last_one_raised(error, log):
    writer, written = Writer(), []

    def fail(given):
        raise error

    writer.submit(groups(1.0), fail, "saved 1")
    writer._thread.join()
    writer.poll()
    assert str(error) in log.text and "tries again" in log.text and "saved 1" not in log.text
    writer.submit(groups(2.0), written.append, "saved 2")
    writer.submit(groups(3.0), fail, "saved 3")
    assert len(written) == 1
    with pytest.raises(type(error)):
        writer.wait(last=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; a test above does the same on a CPU")
def test_copies_from_a_gpu_are_of_the_moment_without_waiting():
    weights = torch.ones(4096, 4096, device="cuda")
    copies, event = Writer().copy({"task": {"w": weights}})
    weights.fill_(2.0)
    event.synchronize()
    assert copies["task"]["w"].is_pinned() and bool((copies["task"]["w"] == 1).all())


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
    lost = AppendFile(Path("/dev/full"))
    lost.write("abc\n")
    lost.close()
    assert "/dev/full lacks its last 4 bytes" in log.text


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
    with pytest.raises(UserError, match="resume: the optimiser of here has 'c/"):
        load_optimizer_state(optimizer("ab"), *optimizer_state(first), "here")


OURS = ("adamw", "adan", "sgd")
TIMMS = ("lamb", "adafactor")
TIMM = {"name": "timm", "extra": {}, "lr": 0.01, "base_lr": 0.0, "weight_decay": 0.05, "layer_decay": 1.0,
        "layer_decay_kind": "single", "rules": []}  # fmt: skip


def stepped(name, device="cpu", memory_format=torch.contiguous_format):
    """Return a small network of a layout, an optimiser over it, and what makes a step of both."""
    torch.manual_seed(0)
    # The linear layer is wide enough for adafactor to keep rows and columns of its weight.
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.Linear(20, 24))
    network.to(device=device, memory_format=memory_format)
    values = yaml.safe_load((CONF / "optim" / f"{name}.yaml").read_text()) if name in OURS else {**TIMM, "opt": name}
    config = TypeAdapter(OptimConfig).validate_python(values)
    optimizer = build_optimizer(config, build_groups(network, {}, config), 0.01)

    def update(step):
        for parameter in network.parameters():
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    return network, optimizer, update


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [(name, torch.contiguous_format) for name in TIMMS] + [(name, torch.channels_last) for name in OURS],
)
def test_optimisers_continue_bit_for_bit(name, memory_format, tmp_path):
    """Six updates equal three, a checkpoint, and three more.

    A file keeps no layout, and fused kernels ask for none; some of timm's count their steps in the group.
    """
    network, optimizer, update = stepped(name, memory_format=memory_format)
    for step in range(3):
        update(step)
    tensors, others = optimizer_state(optimizer)
    path = save_checkpoint(tmp_path, 3, {"task": network.state_dict(), "optimizer": tensors}, {"optimizer": others}, {})
    for step in range(3, 6):
        update(step)

    state = read_state(path)
    saved = read_groups(path, state)
    again, resumed, update = stepped(name, memory_format=memory_format)
    again.load_state_dict(saved["task"])
    load_optimizer_state(resumed, saved["optimizer"], state["optimizer"], "here")
    for step in range(3, 6):
        update(step)
    for one, other in zip(network.parameters(), again.parameters()):
        assert torch.equal(one, other)
    if name == "adafactor":  # without rows and columns the test would prove less
        assert {(24,), (20,)} <= {tuple(value.shape) for value in tensors.values()}
