"""Updates by CUDA graphs: on a GPU the graphs themselves; on a CPU, where a replay computes again, all around them."""

from unittest import mock

import pytest
import torch

from bench.finetune_step import make_batch, make_task
from bench.measure import build_bench_run
from engine.tasks.config import MixingConfig
from engine.tasks.mixing import Mixing
from engine.update import graphs
from tests import small_tasks

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the same runs on a CPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
OPTIMIZERS = {
    "adamw": {"lr": 1e-3},
    "sgd": {"lr": 0.01},
    "timm": {"lr": 0.01, "opt": "muon", "extra": {"ns_steps": 3}},
}


def make_learner(optimizer, device, *, recorded):
    """A learner of a network with drop path and mixed images, whose updates are recorded or not."""
    torch.manual_seed(0)
    task = make_task("test_resnet", 32)
    task.mixing = Mixing(MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.8))
    task.network.drop_path = torch.nn.Dropout(0.5)  # draws on the device
    task.network.register_forward_pre_hook(lambda module, images: module.drop_path(*images))
    return learner_of(task, optimizer, device, recorded)


def learner_of(task, optimizer, device, recorded):
    machine = {"device": device, "precision": "fp32", "deterministic": False, "cuda_graphs": True}
    optim = {"option": optimizer, **OPTIMIZERS[optimizer]}
    learner = build_bench_run(task, batch_size=8, runtime=machine, optim=optim).learner
    assert (learner.graphs is None) == (device == "cpu")
    learner.graphs = learner.record_updates() if recorded else None
    return learner


def batch_of(number, device, count=8):
    torch.manual_seed(number)
    batch = make_batch(32, count, torch.device(device))
    return batch | {"images": torch.randint(0, 256, batch["images"].shape, dtype=torch.uint8).to(device)}


def weights(learner):
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in learner.task.state_dict().values()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recorded_updates_equal_others(optimizer, device):
    """Also after the state was loaded anew, for another batch size, and if an update is skipped."""
    found = []
    for recorded in (False, True):
        learner, losses = make_learner(optimizer, device, recorded=recorded), []
        for number in range(9):
            batch = batch_of(number, device, 4 if number in (2, 7) else 8)
            if number == 5:
                learner.optimizer.load_state_dict(learner.optimizer.state_dict())
            if number == 4:
                batch["weight"] = batch["weight"] * torch.nan
            result = learner.update([batch])
            assert bool(result.applied) == (number != 4)
            losses.append(float(result.sums["loss"][0]))
        found.append((torch.tensor(losses), weights(learner)))
    assert len(learner.graphs.recorded) == 1
    losses, ends = zip(*found)
    torch.testing.assert_close(*losses, rtol=2e-3, atol=1e-3, equal_nan=True)
    torch.testing.assert_close(*ends, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", ["fcmae", "tagging", "diffusion"])
def test_recorded_updates_of_each_task_equal_others(task, device):
    pytest.importorskip("diffusers" if task == "diffusion" else "torch", reason="make install-sdxl")
    kind, setup = small_tasks.make_setup(task)
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        built = kind.build(setup)
        if task == "diffusion":
            built.load_helpers("training")
        learner = learner_of(built, "adamw", device, recorded)
        batch = small_tasks.make_batch(task, setup, device)
        for number in range(4):
            torch.manual_seed(number)
            images = torch.randint(0, 256, batch["images"].shape, dtype=torch.uint8).to(device)
            learner.update([batch | {"images": images}])
        found.append(weights(learner))
    assert len(learner.graphs.recorded) == 1
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


FAILING = {
    "draws on the CPU": lambda logits: torch.rand(()),
    "waits": lambda logits: logits.detach().norm(),
    "takes memory": lambda logits: logits.new_ones(2 ** (50 * torch.cuda.is_current_stream_capturing())),
}


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("factor", FAILING.values(), ids=FAILING)
def test_a_recording_that_fails_leaves_the_gpu_as_it_was(factor):
    """Later updates run on the stream of before, and take no more memory."""
    learner = make_learner("adamw", "cuda", recorded=True)
    learner.task.network.register_forward_hook(lambda module, images, logits: logits * factor(logits).item())
    held = []
    for number in range(6):
        assert learner.update([batch_of(number, "cuda")]).applied
        held.append(torch.cuda.memory_allocated())
    assert learner.graphs.is_off and held[-1] == held[-2]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_recording_is_undone(ends, monkeypatch):
    """torch's own `torch.cuda.graph` runs, on a graph and on streams that are not real."""

    def fails(*_, **__):
        raise RuntimeError("the capture is invalid")

    def function():
        raise RuntimeError("the first error")

    graph = mock.MagicMock()
    (graph.capture_end if ends else graph.capture_begin).side_effect = fails
    streams = ["default"]

    class Context:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before = streams[-1]
            streams.append(self.stream)

        def __exit__(self, *_):
            streams.append(self.before)

    monkeypatch.setattr(torch.cuda, "stream", Context)
    for name in ("synchronize", "empty_cache", "graph_pool_handle", "current_device"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: streams[-1])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "capture")
    monkeypatch.setattr(torch._C, "_host_emptyCache", mock.MagicMock(), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended := mock.MagicMock(), raising=False)
    with pytest.raises(RuntimeError, match="the first error" if ends else "the capture is invalid"):
        graphs.record_graph(function, torch.device("cuda"))
    assert streams[-1] == "default" and ended.called and graph.reset.called


@pytest.mark.parametrize(
    "total, held, update, recorded", [(24, 3, 4, 5), (80, 10, 15, 20), (141, 9, 25, 50), (24, 8, 9, 0)]
)
def test_a_recording_needs_memory_for_itself_and_an_update(total, held, update, recorded, monkeypatch):
    """In GiB; also after an earlier recording of the run, whose memory the allocator keeps. Else none is recorded."""
    reserved = held + update + recorded
    cuda = {"memory_allocated": held, "max_memory_allocated": held + update, "memory_reserved": reserved}
    for name, gib in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: [(total - reserved) * 2**30])
    updates = mock.Mock(device=torch.device("cuda"), recorded={"another": 1})
    graphs.UpdateGraphs._record(updates, "this", {})
    assert updates.drop.called == (recorded == 0)
