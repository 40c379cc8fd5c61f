"""No host synchronisation per step: whatever would make the host wait for a GPU is counted over ten steps of the loop.

On a CPU nothing waits, so the operations themselves are counted: reading a number (`item`, `bool`, `int`, `tolist`),
and what must know it to give its result a shape (`nonzero`, a boolean index). On a GPU torch's own sync debug mode
raises. Steps that log, evaluate or save are excluded: those may wait.
"""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import build_bench_run, read_group
from engine.step import Asks, Vote
from engine.tasks.classification import ClassificationTask, ClassificationTaskConfig
from engine.tasks.fcmae import FCMAETask, FCMAETaskConfig, patch_count
from engine.tasks.kind import Setup
from engine.tasks.kinds import KINDS
from models.config import ModelConfig
from models.fcmae import draw_mask
from optim.build import skips_on_device
from utils.rng import generator_for
from utils.vocabulary import Vocabulary

STEPS, CLASSES, SIZE, BATCH = 10, 5, 32, 4
PREPROCESSING = {"image_size_hw": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3}
aten = torch.ops.aten

# What must read device memory on the host, or the shape of whose result depends on it.
READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten.repeat_interleave.Tensor, aten._unique2.default, aten.bincount.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Reads that no operation shows, and tensors made of Python numbers, which are copied to the device.
FUNCTIONS = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu, torch.tensor, torch.as_tensor,
    torch.from_numpy,
}  # fmt: skip
# Where mixing draws from the CPU's generator: those tensors are the host's own.
HOST_DRAWS = {("mixing.py", "draw")}


def draws_on_host():
    frame = sys._getframe(1)
    while frame is not None:
        if (frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name) in HOST_DRAWS:
            return True
        if frame.f_code.co_filename.endswith("classification.py"):
            return False
        frame = frame.f_back
    return False


class Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found, self.inside_one_hot = found, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = [index for index in args[1] if index is not None] if func in INDEXING else []
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if (func in READS or masks) and not self.inside_one_hot and not draws_on_host():
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, found, operations):
        super().__init__()
        self.found, self.operations = found, operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FUNCTIONS and not draws_on_host():
            self.found.append(getattr(func, "__name__", str(func)))
        # On the CPU alone one_hot looks whether its classes are within bounds.
        self.operations.inside_one_hot = func is torch.nn.functional.one_hot
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.operations.inside_one_hot = False


def count(body):
    """The names of all that would have waited while `body` ran."""
    found = []
    operations = Operations(found)
    with operations, Functions(found, operations):
        body()
    return found


def make_task(kind, **changes):
    if kind == "batch statistics":
        model = read_group(ModelConfig, "model", "timm", name="test_resnet")
    else:
        small = {"depths": [1, 1], "dims": [8, 16], "stem_stride": 2, "drop_path_rate": 0.1}
        model = read_group(ModelConfig, "model", "convnextv2_atto", **small)
    torch.manual_seed(0)
    if kind == "fcmae":
        config = read_group(FCMAETaskConfig, "task", "fcmae", decoder_dim=16, **changes)
        return FCMAETask(Setup(model, config, PREPROCESSING)), model, config
    if kind in ("tagging", "distillation"):
        config = read_group(KINDS[kind].config, "task", kind, **changes)
        names = tuple(str(index) for index in range(CLASSES))
        facts = Vocabulary(names, (9, 9, 0, 0, 0), (1, 2, 3, 4, 5), tuple(range(CLASSES))).facts()
        facts |= {"orientation": {"pairs": [[2, 3]], "dropped": [4], "no_flip": [4]}, "tag_priors": [0.5] * CLASSES}
        facts["teacher"] = {"model": model.model_dump(), "preprocessing": PREPROCESSING, "outputs": CLASSES}
        return KINDS[kind].build(Setup(model, config, PREPROCESSING, facts)), model, config
    config = read_group(ClassificationTaskConfig, "task", "classification", **changes)
    facts = {"class_names": [str(index) for index in range(CLASSES)]}
    return ClassificationTask(Setup(model, config, PREPROCESSING, facts)), model, config


def make_batch(kind, model, config, device, seed):
    generator = generator_for(seed)
    batch = {
        "sample_id": torch.arange(BATCH),
        "key": torch.arange(BATCH),
        "weight": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "images": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
    }
    if kind == "fcmae":
        patches = patch_count(model, config, [SIZE, SIZE])
        batch["mask"] = torch.stack([draw_mask(generator, patches, config.mask_ratio) for _ in range(BATCH)])
    if kind in ("tagging", "distillation"):
        batch |= {"tags": torch.arange(CLASSES), "tags_offsets": torch.tensor([0, 2, 2, 3, CLASSES])}
        batch |= {"rating_known": batch["weight"] > 0, "flip": torch.tensor([0, 1, -1, 0], dtype=torch.int8)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_training(kind, optim, *, device="cpu", accum=1, precision="fp32", **changes):
    """(a run as engine/run.py builds it, in which nothing is due; one step's micro-batches)."""
    task, model, config = make_task(kind, **changes)
    group, _, opt = optim.partition(" ")
    runtime = {"device": device, "precision": precision, "deterministic": False}
    optim = {"option": group, **({"opt": opt} if opt else {})}
    training = build_bench_run(
        task, batch_size=BATCH, accum_steps=accum, runtime=runtime, optim=optim, loop={"ema_decay": 0.99}
    )
    return training, [make_batch(kind, model, config, training.learner.runtime.device, seed) for seed in range(accum)]


def run_steps(training, batches, steps):
    """Run the loop itself until its stream ends."""
    before = training.step
    with pytest.raises(StopIteration):
        training.train_one_epoch(iter([batches] * steps))
    assert training.step == before + steps


CASES = [
    ("fcmae", "adamw", {}),
    ("classification", "adamw", {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}),
    ("tagging", "adamw", {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "tag_weight_power": 0.5}),
    ("distillation", "adamw", {"teacher": "drawn", "targets": "both", "label_share": 0.5}),
    ("classification", "sgd", {}),
    ("batch statistics", "adamw", {}),
]
IDS = [" ".join([kind, optim, *map(str, changes.values())]) for kind, optim, changes in CASES]


@pytest.mark.parametrize("kind, optim, changes", CASES, ids=IDS)
def test_no_step_waits_for_the_device(kind, optim, changes):
    """Of two micro-batches, with the loss scale of fp16."""
    training, batches = make_training(kind, optim, accum=2, **changes)
    training.learner.scale.enabled = True
    assert count(lambda: run_steps(training, batches, STEPS)) == []  # the first step, too


def test_bf16_weights_do_not_wait():
    task, model, config = make_task("classification")
    training = build_bench_run(
        task, batch_size=BATCH, runtime={"precision": "bf16"}, optim={"option": "adamw", "bf16_weights": True}
    )
    batches = [make_batch("classification", model, config, training.learner.runtime.device, 0)]
    assert count(lambda: run_steps(training, batches, STEPS)) == []


def test_timms_optimisers_wait_once_in_a_step():
    training, batches = make_training("classification", "timm lion")
    assert not skips_on_device(training.learner.optimizer)
    assert count(lambda: run_steps(training, batches, STEPS)) == ["aten._local_scalar_dense.default"] * STEPS


def test_means_wait_once():
    training, batches = make_training("classification", "adamw")
    run_steps(training, batches, 3)
    assert count(training.recorder.log_meter.means) == ["tolist"]


VALUES = torch.arange(4.0)
WAITS = {
    "item": lambda: VALUES.sum().item(),
    "bool": lambda: bool(VALUES.sum() > 0),
    "tolist": VALUES.tolist,
    "cpu": VALUES.cpu,
    "numpy": VALUES.numpy,
    "nonzero": lambda: (VALUES > 1).nonzero(),
    "a boolean index": lambda: VALUES[VALUES > 1],
    "a tensor of a number": lambda: VALUES * torch.tensor(2.0),
    "equal": lambda: torch.equal(VALUES, VALUES),
}
FREE = {
    "where": lambda: torch.where(VALUES > 1, VALUES, 0.0),
    "an index of integers": lambda: VALUES[torch.arange(2)],
    "one_hot": lambda: torch.nn.functional.one_hot(torch.arange(3), 4),
}


@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_what_waits_is_counted_and_nothing_else(name):
    assert bool(count({**WAITS, **FREE}[name])) == (name in WAITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the tests above count on the CPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind, optim, changes", CASES, ids=IDS)
def test_on_a_gpu_torchs_own_check_is_silent(kind, optim, changes, precision):
    training, batches = make_training(kind, optim, device="cuda", accum=2, precision=precision, **changes)
    run_steps(training, batches, 2)  # kernels are loaded and chosen, state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_steps(training, batches, STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_fake_cuda.py reads votes on the CPU")
def test_on_a_gpu_ranks_read_the_vote_of_the_step_before(monkeypatch):
    monkeypatch.setattr("utils.ranks.distributed.is_distributed", lambda: True)
    vote, results = Vote(), [torch.tensor([stop, 0.0], device="cuda") for stop in (0.0, 1.0, 0.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [vote.read(result, Asks()).stop for result in results]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == [False, False, True]
