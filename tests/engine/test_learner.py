"""The learner alone, without a run folder: it learns, its state round-trips, names freeze what they say."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from engine.plan import Plan
from engine.run.start import start_ranks
from engine.tasks.kind import Setup, open_kind
from engine.update import parallel
from engine.update.learner import Learner
from engine.update.runtime import choose_runtime
from engine.update.step import first_scale
from tests.in_process import SHORT, SMALL_MODEL, configure
from tests.support import assert_same_tensors, refuses
from utils.config.messages import ConfigError
from utils.errors import UserError
from utils.io.weights import write_tensors
from utils.ranks import distributed

BATCH, SIZE, CLASSES = 8, 16, 4


OURS = (*SMALL_MODEL, "model.head_init_scale=1.0")


def make_learner(*overrides, model=OURS):
    config, _ = configure("finetune", [*model, *SHORT, *overrides])
    facts = {"class_names": [f"c{number}" for number in range(CLASSES)]}
    torch.manual_seed(0)
    task = open_kind("classification").build(Setup(config.model, config.task, config.augment.preprocessing(3), facts))
    return Learner(task, config, Plan(1, BATCH, BATCH, 1, 10 * BATCH, 100, 0, 5e-3), choose_runtime(config.runtime))


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample_id": torch.arange(BATCH),
        "key": torch.arange(BATCH),
        "weight": torch.ones(BATCH),
        "images": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        "labels": torch.arange(BATCH) % CLASSES,
    }


def in_fp16(learner):
    """Give a learner the autocast and the loss scale of fp16, which choose_runtime refuses on a CPU."""
    learner.runtime = replace(learner.runtime, precision="fp16")
    learner.scale = first_scale(learner.runtime)
    return learner


def tensors_of(learner):
    groups, _ = learner.state()
    return {f"{group}/{name}": tensor.clone() for group, named in groups.items() for name, tensor in named.items()}


STATES = {
    "fp16": ["loop.ema_decay=0.9", "runtime.channels_last=true"],
    "bf16 weights": ["optim.bf16_weights=true", "runtime.precision=bf16", "optim.lr=1e-4"],
    "adan": ["optim=adan", "runtime.channels_last=true"],
    "sgd": ["optim=sgd", "runtime.channels_last=true"],
    "lamb": ["optim=timm", "optim.opt=lamb"],
    "adafactor": ["optim=timm", "optim.opt=adafactor"],
    "adafactor in bf16": ["optim=adafactor", "optim.bf16_weights=true", "runtime.precision=bf16", "optim.lr=5e-3"],
    "prodigy": ["optim=prodigy", "+optim.extra.d0=1.0"],
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_saved_in_files_continues_bit_for_bit(case, tmp_path):
    """A file keeps no layout, and fused kernels ask for none; some of timm's count their steps in the group."""
    first, second = make_learner(*STATES[case]), make_learner(*STATES[case])
    if case == "fp16":
        first, second = in_fp16(first), in_fp16(second)
    batch = make_batch()
    losses = [first.update([batch]).losses[0].mean().item() for _ in range(60)]
    tensors, others = first.state()
    assert losses[-1] < losses[0] - 0.1
    found = {tensor.dtype for tensor in tensors["optimizer"].values() if tensor.ndim}
    assert found == {torch.bfloat16 if case == "bf16 weights" else torch.float32}
    saved = {name: group for name, group in tensors.items() if group}  # an empty group has no file
    for name, group in saved.items():
        write_tensors(tmp_path / name, group)
    second.update([make_batch(1)])  # another state, to be replaced
    second.load_state(dict.fromkeys(tensors, {}) | {name: load_file(tmp_path / name) for name in saved}, others, "here")
    second.step = first.step
    for learner in (first, second):
        learner.update([batch])
    assert_same_tensors(tensors_of(first), tensors_of(second))


def test_the_average_is_that_of_the_weights_after_each_update():
    learner, batch = make_learner("loop.ema_decay=0.9", "loop.ema_warmup=true", "loop.ema_start_steps=2"), make_batch()

    def weights():
        return {name: tensor.double() for name, tensor in learner.state()[0]["weights"].items()}

    average = weights()
    for decay in (0, 0, 1 / 10, 2 / 11, 3 / 12, 4 / 13):
        learner.update([batch])
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in weights().items()}
    found = learner.state()[0]["average_weights"]
    torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-7, check_dtype=False)


FUSED = {
    "adamw": [],
    "sgd": ["optim=sgd"],
    "adafactor": ["optim=adafactor"],
    "adafactor in bf16": ["optim=adafactor", "optim.bf16_weights=true", "runtime.precision=bf16"],
    "lion": ["optim=timm", "optim.opt=lion"],
    "bf16 weights": ["optim.bf16_weights=true", "runtime.precision=bf16"],
}


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_backward_pass_makes_the_ordinary_update_bit_for_bit_and_frees_gradients(case):
    """Also with a frozen group, a step without weight and one with a loss that is not finite."""
    rule = "optim.rules=[{match: network.head.*, freeze_steps: 2}]"
    plain, fused = (make_learner(*FUSED[case], rule, f"optim.fused_backward={on}") for on in ("false", "true"))
    for step, spoil in enumerate(("", "", "weight", "loss", "", "")):
        batch, before = make_batch(step), tensors_of(fused)
        batch["weight"] = batch["weight"] * (spoil != "weight")
        results = []
        for learner in (plain, fused):
            bias = learner.task.network.head.bias.data
            finite = bias.clone()
            bias += float("nan") if spoil == "loss" else 0.0
            results.append(learner.update([batch]))
            bias.copy_(finite if spoil == "loss" else bias)
            assert all(parameter.grad is None for parameter in learner.task.parameters())
        assert results[0].names == results[1].names and torch.equal(results[0].figures, results[1].figures)
        assert results[1].applied == (not spoil)
        right = tensors_of(fused)
        assert_same_tensors(tensors_of(plain), right)
        kept = [name for name in before if spoil or (step < 2 and "/head." in name)]  # its first update makes its state
        assert all(torch.equal(before[name], right[name]) for name in kept) and bool(kept) == (step < 4), step


def test_a_gradient_that_is_not_finite_skips_its_own_parameter_in_a_fused_pass():
    learner, batch = make_learner("optim.fused_backward=true"), make_batch()
    learner.update([batch])
    parameters = dict(learner.task.named_parameters())
    parameters["network.head.weight"].register_hook(lambda grad: grad * float("nan"))
    before = deepcopy(parameters)
    assert learner.update([batch]).applied == 0
    unchanged = {name for name, parameter in parameters.items() if torch.equal(parameter, before[name])}
    assert unchanged == {"network.head.weight"}


@pytest.mark.parametrize("words", ["runtime.precision=fp32", "runtime.precision=bf16 loop.ema_decay=0.9"])
def test_what_excludes_each_other_is_refused(words):
    with pytest.raises((UserError, ConfigError), match="optim.bf16_weights: true"):
        make_learner("optim.bf16_weights=true", *words.split())


def test_ranks_send_gradients_beside_a_compiled_backward_pass_and_say_that_they_record_no_update(monkeypatch, log):
    """torch splits the graph at buckets, so the gradients of a part are sent while those before it are computed."""
    learner = make_learner("runtime.cuda_graphs=true", "runtime.deterministic=false")
    backend = mock.Mock(side_effect=lambda graph, _: graph)
    monkeypatch.setattr(learner.task, "compile", partial(learner.task.compile, backend=backend))
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = parallel.wrap_task(learner.task, learner.config.runtime, learner.runtime, compiles=True)
    model(learner.prepare(make_batch()), torch.tensor(0.5))
    dist.destroy_process_group()
    assert backend.call_count > 1
    learner.runtime = replace(learner.runtime, device=torch.device("cuda"))
    assert not learner._may_record()
    assert log.records[-1].levelname == "INFO" and "cuda_graphs: not with several ranks" in log.messages[-1]


def test_the_state_of_another_network_is_refused():
    with refuses(r"^resume: here is a checkpoint of another model: \d+ tensors of weights"):
        make_learner().load_state(*make_learner("model.dims=[8,24]").state(), "here")


@pytest.mark.parametrize(
    "ranks, words, said",
    [
        (2, [], "2 ranks"),
        (1, ["loop.micro_batch_size=4"], "2 micro-batches of 4"),
        (1, ["loop.clip_grad_norm=1.0"], "loop.clip_grad_norm"),
    ],
)
def test_what_needs_all_gradients_refuses_a_fused_pass(ranks, words, said, monkeypatch):
    sizes = ["loop.batch_size=8", "loop.micro_batch_size=8"]
    config, _ = configure("finetune", [*OURS, *SHORT, *sizes, "optim.fused_backward=true", *words])
    monkeypatch.setattr(distributed, "planned_world_size", lambda: ranks)
    with refuses(rf"optim\.fused_backward.*{said}"):
        start_ranks(config)
