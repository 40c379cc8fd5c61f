"""Checkpoints: round trips, what damage is noticed, retention, and refusals."""

import json
import shutil

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from engine.checkpoint import (
    find_checkpoint,
    find_continuation,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    move_aside_beyond,
    remove_old,
    save_checkpoint,
)
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.groups import build_groups
from optim.state import check_optimizer_state, load_optimizer_state, optimizer_state
from utils.config.entry_point import CONF
from utils.errors import UserError
from utils.io.files import sha256_file, sha256_text


def make(folder, step, value=1.0):
    tensors = {"task": {"w": torch.full((3, 2), value), "n": torch.tensor(step)}, "optimizer": {"m": torch.ones(2)}}
    return save_checkpoint(folder, step, tensors, {"config": {"seed": 0}, "best": {"value": 0.5, "step": 1}})


def test_what_is_saved_comes_back(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {"task": {"a": shared, "b": shared[1], "c": shared.t(), "last": last}, "optimizer": {}}
    path = save_checkpoint(tmp_path, 7, tensors, {"best": {"value": 0.1 + 0.2, "step": 3}})
    checkpoint = load_checkpoint(path)
    assert checkpoint.step == 7 and checkpoint.state["best"] == {"value": 0.1 + 0.2, "step": 3}
    for name, tensor in tensors["task"].items():
        assert torch.equal(checkpoint.tensors["task"][name], tensor)
    assert checkpoint.tensors["optimizer"] == {}  # plain SGD has no state
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.sha256", "task.safetensors"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: flip_a_bit(path / "task.safetensors"), "task.safetensors does not match its checksum"),
        (lambda path: (path / "task.safetensors").write_bytes(b"short"), "task.safetensors does not match"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda path: flip_a_bit(path / "state.json"), "state.json does not match its checksum"),
        (lambda path: (path / "state.sha256").unlink(), "state.sha256 is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(harm, said, tmp_path, log):
    good, newest = make(tmp_path, 10), make(tmp_path, 20)
    harm(newest)
    assert find_checkpoint(tmp_path) == good
    assert f"checkpoint {newest} is damaged: {said}" in log.text
    with pytest.raises(UserError, match=r"resume: .* is damaged: .*; name another one or set resume=auto"):
        load_checkpoint(newest)


def test_a_half_written_checkpoint_is_none_and_is_removed_later(tmp_path):
    half = tmp_path / ".step_00000030.tmp-1"
    shutil.copytree(make(tmp_path, 10), half)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]
    remove_old(tmp_path, keep=2, step=10, best_step=None)
    assert not half.exists()


def test_an_error_while_writing_leaves_the_old_ones_and_nothing_else(tmp_path, monkeypatch):
    make(tmp_path, 10)

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.checkpoint.write_tensors", full)
    with pytest.raises(
        UserError, match=r"^run_dir: the checkpoint of step 20 cannot be written to .*: it needs 0\.0 MiB"
    ):
        make(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


def forge(path, change):
    """Change a checkpoint's state as somebody would who makes its checksums right."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    text = json.dumps(state)
    (path / "state.json").write_text(text)
    (path / "state.sha256").write_text(sha256_text(text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["checksums"].update({"../x.safetensors": "0"}), "names '../x.safetensors'"),
        (lambda state: state["checksums"].update({"/etc/passwd": "0"}), "names '/etc/passwd'"),
        (lambda state: state.update(groups=["../x"], checksums={"../x.safetensors": "0"}), "names '../x.safetensors'"),
        (lambda state: state.update(checksums=[]), "cannot be read (AttributeError"),
        (lambda state: state.update(groups=[1]), "cannot be read (TypeError"),
        (lambda state: state.pop("groups"), "cannot be read (KeyError"),
        (lambda state: state.update(format=99), "state.json has format 99, this version reads 2"),
    ],
    ids=["parent", "absolute", "group", "list", "number", "none", "format"],
)
def test_a_state_of_another_form_is_refused(change, said, tmp_path):
    path = make(tmp_path, 10)
    forge(path, change)
    with pytest.raises(UserError) as refused:
        load_checkpoint(path)
    assert str(refused.value).startswith(f"resume: {path} is damaged: ") and said in str(refused.value)


def test_a_header_that_lies_is_refused_though_its_checksum_is_right(tmp_path):
    path = make(tmp_path, 10)
    file = path / "task.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[3,2]', b'"shape":[9,9]'))
    forge(path, lambda state: state["checksums"].update({file.name: sha256_file(file)}))
    with pytest.raises(UserError, match=r"^resume: .*task\.safetensors is not a readable safetensors file"):
        load_checkpoint(path)


def test_the_check_comes_before_any_tensor_is_read(tmp_path, monkeypatch):
    path = make(tmp_path, 10)
    monkeypatch.setattr("utils.io.weights.load_file", lambda path: pytest.fail("the tensors were read"))

    def refuse(checkpoint):
        assert checkpoint.step == 10 and checkpoint.tensors["task"]["w"].is_meta
        assert checkpoint.tensors["task"]["w"].shape == (3, 2)
        raise UserError("of another model")

    with pytest.raises(UserError, match="of another model"):
        load_checkpoint(path, refuse)


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("there", "keep", "step", "best", "left"),
    [
        ([10, 20, 30, 40], 2, 40, 10, [10, 30, 40]),
        ([1200, 1300, 1400], 1, 1300, None, [1300, 1400]),
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
    hidden = move_aside_beyond(tmp_path, 10)
    assert steps_in(tmp_path) == [10] and all(path.is_dir() for path in hidden) and len(hidden) == 2
    assert find_damage(hidden[0]) is None  # whole: it may be renamed back
    make(tmp_path, 20)
    move_aside_beyond(tmp_path, 10)  # by a process of the same number
    make(tmp_path, 15)
    remove_old(tmp_path, keep=1, step=15, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000015"]


def test_a_continuation_is_the_newest_and_of_the_same_command(tmp_path, log):
    def saved(step, resume):
        return save_checkpoint(tmp_path, step, {"task": {"n": torch.tensor(step)}}, {"config": {"resume": resume}})

    assert find_checkpoint(tmp_path / "none") is find_continuation(tmp_path, "run/step_00000010") is None
    saved(10, "auto")
    assert find_continuation(tmp_path, "run/step_00000010") is None
    made = saved(20, "run/step_00000010")
    flip_a_bit(saved(30, "run/step_00000010") / "task.safetensors")
    assert find_continuation(tmp_path, "run/step_00000010/") == made
    assert find_continuation(tmp_path, "run/step_00000020") is None
    assert "step_00000030 is damaged" in log.text
    saved(40, "auto")
    assert find_continuation(tmp_path, "run/step_00000010") is None
    saved(40, "run/step_00000010")  # the same step is written again
    for path in list_checkpoints(tmp_path):
        flip_a_bit(path / "state.json")
    for find in (find_checkpoint, lambda folder: find_continuation(folder, "run/step_00000010")):
        with pytest.raises(UserError, match="resume: all [34] checkpoints in .* are damaged"):
            find(tmp_path)  # never a start from zero


def test_optimiser_state_is_kept_by_name_for_any_groups(tmp_path):
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
    load_optimizer_state(second, *optimizer_state(first))
    for parameter in parameters.values():
        for key, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][key], value)
    with pytest.raises(UserError, match="resume: the optimiser of the checkpoint knows 'c', which this model does not"):
        load_optimizer_state(optimizer("ab"), *optimizer_state(first))


# --- what an optimiser's state may be

OURS = ("adamw", "adan", "sgd")
TIMMS = ("nadamw", "lamb", "lambc", "adanw", "lion", "muon", "adafactor")
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
    [(name, torch.contiguous_format) for name in OURS + TIMMS] + [(name, torch.channels_last) for name in OURS],
)
def test_optimisers_continue_bit_for_bit(name, memory_format, tmp_path):
    """Six updates equal three, a checkpoint, and three more.

    A file keeps no layout, and fused kernels ask for none; some of timm's count their steps in the group.
    """
    network, optimizer, update = stepped(name, memory_format=memory_format)
    for step in range(3):
        update(step)
    tensors, others = optimizer_state(optimizer)
    path = save_checkpoint(tmp_path, 3, {"task": network.state_dict(), "optimizer": tensors}, {"optimizer": others})
    for step in range(3, 6):
        update(step)

    checkpoint = load_checkpoint(path)
    again, resumed, update = stepped(name, memory_format=memory_format)
    again.load_state_dict(checkpoint.tensors["task"])
    load_optimizer_state(resumed, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    for step in range(3, 6):
        update(step)
    for one, other in zip(network.parameters(), again.parameters()):
        assert torch.equal(one, other)
    if name == "adafactor":  # without rows and columns the test would prove less
        assert {(24,), (20,)} <= {tuple(value.shape) for value in tensors.values()}


@pytest.mark.parametrize("name", OURS)
def test_an_optimisers_state_comes_to_the_device_of_its_parameters(name):
    _, optimizer, update = stepped(name)
    update(0)
    network, resumed, _ = stepped(name, device="meta")
    load_optimizer_state(resumed, *optimizer_state(optimizer))
    for parameter in network.parameters():
        assert resumed.state[parameter] and all(value.is_meta for value in resumed.state[parameter].values())


FORGED = {  # what stands under the name in place of the whole shape (4, 3, 2, 2), or of a float32 scalar
    "one number": ("0.weight/exp_avg", torch.zeros(1), r"is \(1,\) \(torch.float32\), where this model needs \(4, 3"),
    "a scalar": ("0.weight/exp_avg_sq", torch.zeros(()), r"is \(\) \(torch.float32\)"),
    "another order": ("0.weight/exp_avg", torch.zeros(3, 4, 2, 2), r"is \(3, 4, 2, 2\)"),
    "another dtype": ("0.weight/exp_avg", torch.zeros(4, 3, 2, 2).half(), r"is \(4, 3, 2, 2\) \(torch.float16\)"),
    "a list of steps": ("0.weight/step", torch.zeros(2), r"is \(2,\) .*needs \(\) \(torch.float32\)"),
    "steps of one byte": ("0.weight/step", torch.zeros((), dtype=torch.int8), r"is \(\) \(torch.int8\)"),
    "no tensor": ("0.weight/exp_avg", 0.5, r"is float \(not a tensor\)"),
    "a new one": ("0.weight/more", torch.zeros(1), r"is \(1,\)"),
}


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_a_state_of_another_shape_is_refused_where_kernels_would_not_notice(name, kind):
    _, optimizer, update = stepped(name)
    update(0)
    before = {key: value.clone() for key, value in optimizer_state(optimizer)[0].items()}
    tensors, others = optimizer_state(optimizer)
    full, value, said = FORGED[kind]
    (tensors if isinstance(value, torch.Tensor) else others)[full] = value
    shapes = {key: tensor.to("meta") for key, tensor in tensors.items()}
    with pytest.raises(UserError, match=rf"^resume: '{full}' of the optimiser of run/step_1 {said}"):
        check_optimizer_state(optimizer, shapes, others, "run/step_1")
    with pytest.raises(UserError, match=rf"^resume: '{full}' of the optimiser of the checkpoint {said}"):
        load_optimizer_state(optimizer, tensors, others)
    after = optimizer_state(optimizer)[0]
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["lamb", "adanw", "muon", *OURS])
def test_a_state_may_not_change_a_groups_settings(name):
    """Some of timm's keep their steps in the group, ours keep nothing there."""
    _, optimizer, _ = stepped(name)
    first = optimizer.param_groups[0]["names"][0]
    others = {"lr": 9.0, "weight_decay": 0.5, "params": [], "names": ["x"], "betas": [0, 0], "eps": 1.0, "new": 1}
    for key, value in (others | ({"step": 1} if name in OURS else {})).items():
        with pytest.raises(UserError, match=rf"^resume: run/step_1 holds '{first}//{key}', which is not state of this"):
            load_optimizer_state(optimizer, {}, {f"{first}//{key}": value}, "run/step_1")
    with pytest.raises(UserError, match="has other parameter groups"):
        load_optimizer_state(optimizer, {}, {"elsewhere//step": 1})
