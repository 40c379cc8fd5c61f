"""Training steps on CUDA tensors that do not exist: finds, without a GPU, what a GPU would refuse.

    python tests/fake_cuda.py TASK:OPTIMISER:PRECISION ...      one line of JSON for each case
    python tests/fake_cuda.py images                            the changes of images on the device
    python tests/fake_cuda.py faults                            planted faults that must be found

Tensors are those of torch's FakeTensorMode: they have shape, dtype, layout and the device cuda:0, but no memory. Every
operation checks devices and dtypes as on a GPU, and autocast is that of CUDA. What runs is the loop of every entry
point, an evaluation of weights and averages, the writer's copies to the host, a reload, and more steps. Neither
the steps nor the measures of an evaluation, while batches are added, may read on the host.

Three things replace the machine. A shim (C, compiled by cc, loaded before torch) answers that no device has a context:
without a driver, a CUDA build of torch cannot run a backward pass over fake tensors otherwise. `Device`, a dispatch
mode, reports reads of device memory on the host, counts copies of maps to another dtype or layout, and checks the fused
optimiser kernels, which have no fake form.
`HostArrays` gives zeros where a tensor leaves torch. Not covered: numbers, streams, cuDNN, NCCL, DDP.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

_SHIM = """
static signed char count = 0;
void set_device_count(int n) { count = (signed char)n; }
signed char _ZN3c104cuda12device_countEv(void) { return count; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
"""


def _load_shim():
    """Compile and load the shim; None where torch has no CUDA or the machine has a driver."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    if not (torch_folder / "lib/libc10_cuda.so").exists() or Path("/dev/nvidiactl").exists():
        return None
    folder = Path(tempfile.mkdtemp(prefix="fake_cuda_"))
    (folder / "shim.c").write_text(_SHIM)
    # The driver's name: torch takes the library that is loaded already.
    name = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", name, "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return ctypes.CDLL(str(folder / "shim.so"), ctypes.RTLD_GLOBAL)


_shim = _load_shim()  # before torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.measure import build_bench_run
from data.augment.steps import AUGMENT
from engine.measures import probe as probe_module
from engine.measures.confusion import ConfusionCounts
from engine.measures.means import Means
from engine.measures.tag_scores import TagScores
from engine.measures.tags import TagHistograms
from engine.measures.top_samples import TopSamples
from engine.run.checkpoint import copy_to_host
from engine.task import Streams
from engine.tasks import tagging as tagging_module
from engine.update import runtime as runtime_module
from tests.small_tasks import BATCH, make_batch, make_setup, patch_configs
from utils.cut import cut_images
from utils.errors import UserError

DEVICE = torch.device("cuda", 0)
STEPS = 1  # before and after a reload
ADDS = {measure: measure.add for measure in (ConfusionCounts, Means, TagHistograms, TopSamples)}
IDLE = "manual_seed", "reset_peak_memory_stats", "synchronize", "empty_cache"  # of torch.cuda
_VALUE_SHAPED = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount", "aten::equal"}
_FUSED = {"aten::_fused_sgd_", "aten::_fused_adamw_"}
# CUDA kernels that refuse two floating-point dtypes where the fake ones do not.
_ONE_DTYPE = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward"),
    *("aten::index_copy", "aten::index_copy_", "aten::index_put_", "aten::index_add", "aten::scatter", "aten::gather"),
    *("aten::native_layer_norm", "aten::gelu_backward"),  # its backward kernel takes statistics in float32
}
# Torch has no form of it for tensors without memory.
_META = torch.library.Library("aten", "IMPL", "Meta")
_META.impl("_sample_dirichlet", lambda concentration, generator=None: torch.empty_like(concentration))


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Device(TorchDispatchMode):
    """Report host reads of device memory while `strict`, and check what fake kernels do not check."""

    def __init__(self):
        super().__init__()
        self.strict, self.waits, self.map_copies = False, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        given = _tensors((args, kwargs))
        on_device = any(tensor.device.type == "cuda" for tensor in given)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # needs a driver
        if func is torch.ops.aten._local_scalar_dense.default:
            self._report("a number is read", on_device)
            return {torch.bool: not on_device, torch.int64: 0, torch.int32: 0, torch.uint8: 0}.get(args[0].dtype, 0.5)
        masks = name.startswith("aten::index") and any(t.dtype == torch.bool for t in _tensors(args[1:2]))
        if name in _VALUE_SHAPED or masks:
            self._report(f"the shape of {name} depends on values", on_device)
            if name == "aten::equal":
                return True
            if masks:
                indices = [t if t is None else torch.arange(len(t), device=t.device) for t in args[1]]
                args = (args[0], indices, *args[2:])
        if name in _FUSED:
            return _check_fused(name, args, kwargs)
        if name in _ONE_DTYPE and on_device:
            dtypes = {tensor.dtype for tensor in given if tensor.is_floating_point()}
            assert len(dtypes) <= 1, f"{name} of {sorted(map(str, dtypes))}"
        out = func(*args, **kwargs)
        if self.strict and name in ("aten::_to_copy", "aten::clone"):
            self.map_copies += out.ndim == 4 and out[0].numel() > 64 and 3 not in out.shape  # no weight, no pixels
        if name in ("aten::_to_copy", "aten::copy_"):
            devices = {tensor.device.type for tensor in [*given, *_tensors(out)]}
            background = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            self._report("a copy between host and device", devices == {"cpu", "cuda"} and not background)
        return out

    def _report(self, what, happened):
        if self.strict and happened:
            frames = [frame for frame in traceback.extract_stack()[:-2] if frame.name != "__torch_function__"]
            own = [frame for frame in frames if "site-packages" not in frame.filename]
            self.waits.append(f"{what} at {Path(own[-1].filename).name}:{own[-1].lineno}")


def _strides(tensor):
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)


def _check_fused(name, args, kwargs):
    """Check what torch's fused kernels require on CUDA: equal devices, dtypes, shapes and strides."""
    lists = [value for value in args[:4] if isinstance(value, list | tuple) and len(value)]
    for members in zip(*lists):
        forms = {(str(tensor.device), tensor.dtype, tensor.shape, _strides(tensor)) for tensor in members}
        assert len(forms) == 1, f"{name}: {forms}"
    flag, place = kwargs.get("found_inf"), lists[0][0].device
    assert flag is None or (flag.device == place and flag.dtype == torch.float32), f"{name}: found_inf {flag}"
    for step in args[5] if name != "aten::_fused_sgd_" else []:
        assert step.device == place and step.dtype == torch.float32, f"{name}: step {step}"


class HostArrays(TorchFunctionMode):
    """Give zeros for tensors that become NumPy arrays, and an address for tensors without memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = args[0] if args else None
        if isinstance(tensor, FakeTensor):
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                assert tensor.device.type == "cpu", "numpy() of a CUDA tensor"
                return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if func is torch.Tensor.data_ptr:
                return tensor.untyped_storage()._cdata
        return func(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """One of the host: that of a device asks the driver."""

    def __new__(cls, device=None):
        return super().__new__(cls)


def _apply(self, fn, recurse=True):
    """Replace nn.Module._apply: torch cannot move parameters without memory in place."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = fn(parameter.detach())
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


@contextlib.contextmanager
def fake_gpu():
    """Pretend a machine with one GPU; yields the Device."""
    device, select = Device(), torch._C._select_conv_backend

    def select_conv_backend(*given, **named):  # by position or by name, from release to release
        on_device = any(tensor.device.type == "cuda" for tensor in _tensors((given, named)))
        return torch._C._ConvBackend.Cudnn if on_device else select(*given, **named)

    replaced = [
        (torch._C, "_select_conv_backend", select_conv_backend),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=2**37)),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        *((torch.cuda, name, lambda *_: None) for name in IDLE),
        (torch.cuda, "memory_allocated", lambda *_: 0),
        (torch.cuda, "max_memory_allocated", lambda *_: 2**30),
        (torch.cuda, "memory_reserved", lambda *_: 0),
        (torch.cuda, "mem_get_info", lambda *_: (2**37, 2**37)),
        (torch.cuda, "graph_pool_handle", mock.MagicMock),
        (torch.cuda, "Event", mock.MagicMock),
        (torch.cuda, "CUDAGraph", mock.MagicMock),
        *((torch.cuda, name, mock.MagicMock()) for name in ("graph", "Stream", "stream", "current_stream")),
        (torch, "Generator", Generator),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (runtime_module, "missing_for_compile", lambda _: []),
        (fake_tensor, "init_gpu_context", lambda _: None),  # torch 2.11 would make a real tensor
        (nn.Module, "_apply", _apply),
    ]
    # Attention asks the driver which of its kernels suits, but for that of plain operations.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, sdpa_kernel(SDPBackend.MATH):
        avoids = mode.avoid_device_init  # asked before torch.cuda.is_available is replaced
        replaced.append((FakeTensorMode, "avoid_device_init", property(lambda self: avoids)))
        with contextlib.ExitStack() as stack:
            for holder, name, value in replaced:
                stack.enter_context(mock.patch.object(holder, name, value))
            if _shim is not None:
                _shim.set_device_count(127)
                stack.callback(_shim.set_device_count, 0)
            with device, HostArrays():
                yield device


# ------------------------------------------------------------------------------------------------------------ the cases


def run_steps(run, batches):
    try:
        run.train_one_epoch(iter([batches] * STEPS))
    except StopIteration:
        return
    except RuntimeError as error:
        if not isinstance(error.__cause__, StopIteration):
            raise


def watched(add, device):
    """Return a measure's `add` within which host reads are reported."""

    def strictly(*arguments):
        device.strict = True
        add(*arguments)
        device.strict = False

    return strictly


def run_case(task, optim, precision):
    """Run steps, evaluations, copies, a reload and more steps; returns the host reads within the steps and measures,
    and how often the steps copied a map.
    """
    with fake_gpu() as device:
        for measure, add in ADDS.items():
            measure.add = watched(add, device)
        kind, setup = make_setup(task)
        torch.manual_seed(0)
        network = kind.build(setup)
        network.load_helpers("training")
        run = build_bench_run(
            network, batch_size=BATCH, accum_steps=2, optim={"option": optim}, loop={"ema_decay": 0.99},
            runtime={
                "device": "cuda", "precision": precision, "channels_last": True, "deterministic": False,
                "cuda_graphs": task == "fcmae",
            },
        )  # fmt: skip
        learner = run.learner
        batches = [make_batch(task, setup, DEVICE) for _ in range(2)]

        device.strict = True
        run_steps(run, batches)
        device.strict = False
        probe_module._score = lambda *_: {}  # runs on the CPU and needs numbers
        tagging_module.TagScores = score_tags
        loaders = {"val": batches, **dict.fromkeys(("probe_train", "probe_val"), batches)}
        run.evaluator.streams = Streams(None, loaders, {})
        run.evaluator.measure(only_draws=False)
        if learner.exports_average:
            with learner.averages.swapped():
                run.evaluator.measure(only_draws=False)
        run.recorder.log_meter.means()
        groups, others = learner.state()
        copies = copy_to_host(groups)
        assert all(tensor.device.type == "cpu" for group in copies.values() for tensor in group.values())
        learner.load_state(copies, others, "the copies")
        _check_devices(learner)
        device.strict = True
        run_steps(run, batches)
        return device.waits, device.map_copies


def change_images():
    """Augment images and cut windows out of them; returns the host reads."""
    from tests.data.augment.test_on_device import ALL, SIZE, config_of, draw_batch

    augment, images, _, parameters, keys = draw_batch(config_of(**ALL), 4)
    with fake_gpu() as device:
        batch = {"images": images.to(DEVICE), "key": keys.to(DEVICE), AUGMENT: parameters.to(DEVICE)}
        windows = zeros(4, 5).long() + 1
        device.strict = True
        augment.on_device(batch)
        cut_images(batch["images"].flatten(), windows, [2, 3, 3], SIZE, "bicubic")
        return device.waits


def score_tags(counts, vocabulary, old=()):
    """Stand for TagScores: no tag has a positive where all arrays are zeros."""
    with contextlib.suppress(UserError):
        TagScores(counts, vocabulary)
    return SimpleNamespace(scalars=dict, tables=dict, groups={})


def _check_devices(learner):
    """Check that everything a step uses is on the device."""
    task = learner.task
    used = [task.state_dict(), dict(task.named_buffers()), learner.scale, list(learner.optimizer.state.values())]
    devices = {tensor.device for tensor in _tensors(used)}
    assert devices == {DEVICE}, devices


def zeros(*shape):
    return torch.zeros(shape, device=DEVICE)


_READ, _COPY = "a number is read", "a copy between host and device"
# Each fault, and what is said of it.
FAULTS = {
    "a CPU tensor in CUDA arithmetic": (lambda: zeros(3) + torch.zeros(3), "on the same device"),
    "item": (lambda: zeros(1).item(), _READ),
    "a boolean index": (lambda: zeros(3)[zeros(3) > 0], "the shape of aten::index depends on values"),
    "a copy to the host": (lambda: zeros(3).cpu(), _COPY),
    "matrices of two dtypes": (
        lambda: zeros(2, 2) @ zeros(2, 2).bfloat16(), "aten::mm of ['torch.bfloat16', 'torch.float32']",
    ),
}  # fmt: skip


def find_fault(body, expected):
    """Return whether a planted fault is found, and nothing else."""
    with fake_gpu() as device:
        device.strict = True
        try:
            body()
        except Exception as error:
            device.waits.append(str(error))
        return bool(device.waits) and all(expected in text for text in device.waits)


def main():
    patch_configs()
    for case in sys.argv[1:]:
        row = {"case": case, "error": None, "waits": []}
        try:
            if case == "faults":
                row["waits"] = [name for name, fault in FAULTS.items() if not find_fault(*fault)]  # those missed
            elif case == "images":
                row["waits"] = change_images()
            else:
                row["waits"], row["map_copies"] = run_case(*case.split(":"))
        except Exception as error:
            row["error"] = "".join(traceback.format_exception(error)[-4:])
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch's own exit aborts with the shim
