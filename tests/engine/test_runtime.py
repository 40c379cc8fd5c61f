"""What `auto` chooses on which machine: literal tables, on machines that are not there."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from engine.config import RuntimeConfig
from engine.run.start import keep_threads
from engine.update.runtime import COMPILE_PAYS_FROM, choose_compile, choose_runtime
from tests.support import refuses, set_variables
from utils.hardware import missing_for_compile
from utils.ranks.distributed import GPUS_VARIABLE

CONFIG = RuntimeConfig(
    device="cpu", precision="fp32", compile="auto", channels_last=False, workers=0, prefetch_batches=1, threads=1,
    deterministic=False, grad_checkpointing=False, offload=False, memory_gib=None,
    hang_timeout_sec=60.0, cuda_graphs=True,
)  # fmt: skip
AUTO = {"device": "auto", "precision": "auto", "channels_last": "auto", "workers": "auto"}
MATMUL, CONV = torch.backends.cuda.matmul, torch.backends.cudnn.conv


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Give the machine these programs, headers and variables, and nothing else."""

    def make(programs=(), headers="include", triton=True, **variables):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in programs:
            (folder / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(folder))
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        set_variables(monkeypatch, variables)
        if headers is not None:
            (tmp_path / headers).mkdir()
            (tmp_path / headers / "Python.h").touch()
        schemes = {"default": str(tmp_path / "include"), "posix_prefix": str(tmp_path / "prefix")}
        monkeypatch.setattr("utils.hardware.sysconfig.get_path", lambda _, scheme="default": schemes[scheme])
        monkeypatch.setattr("utils.hardware.find_spec", lambda name: object() if triton else None)

    return make


def chooses_compile(device, steps, minutes=None, **changes):
    config = SimpleNamespace(runtime=CONFIG.model_copy(update=changes), loop=SimpleNamespace(minutes=minutes))
    return choose_compile(config, device, steps)


@pytest.mark.parametrize(
    "device, given, missing",
    [
        ("cpu", {"programs": ["g++"]}, []),
        ("cpu", {"headers": None, "CXX": "nope -O3"}, ["(nope; CXX sets it)", "headers"]),
        ("cuda", {"programs": ["clang"]}, []),
        ("cuda", {"programs": ["g++"], "triton": False}, ["(gcc or clang; ", "the package triton"]),
    ],
)
def test_a_run_is_compiled_where_that_pays_and_what_is_missing_is_named(device, given, missing, machine):
    machine(**given)
    found = missing_for_compile(device)
    assert len(found) == len(missing) and all(wanted in text for wanted, text in zip(missing, found)), found
    here = device == "cuda" and not missing
    least = COMPILE_PAYS_FROM["steps"]
    for steps, minutes, pays in ((least - 1, None, False), (least, None, here), (least, 1.0, False), (1, 10.0, here)):
        assert chooses_compile(device, steps, minutes) == pays  # auto
    for off in ({"deterministic": True}, {"compile": False}):
        assert not chooses_compile(device, least, **off)
    with refuses("^runtime.compile: true needs ") if missing else nullcontext():
        assert chooses_compile(device, 1, compile=True)


@pytest.fixture
def chosen(monkeypatch):
    """Return what choose_runtime chooses, with a GPU of this capability where one is given.

    It sets switches of the process, which are put back afterwards.
    """
    cudnn = torch.backends.cudnn
    before = CONV.fp32_precision, cudnn.benchmark
    matmul, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.setenv(name, "")  # so that what the code sets is removed again
        monkeypatch.delenv(name)

    def choose(capability=None, **changes):
        monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
        monkeypatch.setattr("torch.cuda.device_count", lambda: int(capability is not None))
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        return choose_runtime(CONFIG.model_copy(update=AUTO | changes))

    yield choose
    CONV.fp32_precision, cudnn.benchmark = before
    torch.set_float32_matmul_precision(matmul)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_a_gpu_takes_bf16_where_it_multiplies_it(capability, precision, chosen):
    runtime = chosen(capability)
    assert (str(runtime.device), runtime.precision, runtime.channels_last) == ("cuda:0", precision, True)
    assert chosen(capability, precision="fp32").precision == "fp32"
    assert chosen(capability, channels_last=False).channels_last is False


@pytest.mark.parametrize(
    "capabilities, precision",
    [
        (["avx2"], "fp32"),
        (["avx512_bf16"], "bf16"),  # AMD
        (["avx512_bf16", "avx512_fp16"], "fp32"),  # Intel; AMX hidden by a virtual machine
        (["avx512_bf16", "avx512_fp16", "amx_bf16"], "bf16"),
    ],
)
def test_a_cpu_takes_bf16_where_it_multiplies_it_faster(capabilities, precision, chosen, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: dict.fromkeys(capabilities, True))
    runtime = chosen()
    assert (str(runtime.device), runtime.precision, runtime.channels_last) == ("cpu", precision, precision == "bf16")
    assert chosen((9, 0), device="cpu").precision == precision  # the GPU's bf16 is not the CPU's
    assert chosen(precision="bf16").precision == "bf16"
    assert chosen(channels_last=True).channels_last is True and not chosen(precision="fp32").channels_last


@pytest.mark.parametrize(
    "precision, deterministic, float32",
    [("auto", False, "tf32"), ("fp32", False, "ieee"), ("auto", True, "ieee")],
)
def test_float32_is_exact_where_it_is_a_reference(precision, deterministic, float32, chosen):
    """Whatever the job before has set."""
    other = {"tf32": "ieee", "ieee": "tf32"}[float32]
    MATMUL.fp32_precision = CONV.fp32_precision = other
    torch.backends.cudnn.benchmark = deterministic
    chosen(precision=precision, deterministic=deterministic)
    assert (MATMUL.fp32_precision, CONV.fp32_precision) == (other, other)  # a CPU has no use for them
    chosen((8, 0), precision=precision, deterministic=deterministic)
    assert (MATMUL.fp32_precision, CONV.fp32_precision) == (float32, float32)
    assert MATMUL.allow_tf32 is (float32 == "tf32")  # the older name may be read, too
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


TORCHRUN, SLURM = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4"}, "SLURM_STEP_TASKS_PER_NODE"


@pytest.mark.parametrize(
    "usable, machine, variables, workers",
    [
        (8, 64, {}, 7),
        (32, 64, TORCHRUN, 7),  # a container's cores, shared by its ranks
        (16, 64, {SLURM: "4(x2)"}, 15),  # each task is bound to its own cores
        (1, 64, {SLURM: "4(x2)"}, 1),
    ],
)
def test_workers_are_a_share_of_the_cores(usable, machine, variables, workers, chosen, monkeypatch):
    set_variables(monkeypatch, variables)
    monkeypatch.setattr("os.cpu_count", lambda: machine)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(usable)), raising=False)
    assert chosen((9, 0)).workers == workers
    assert chosen().workers == 0  # on a CPU, training needs the cores itself
    assert (chosen((9, 0), workers=0).workers, chosen(workers=30).workers) == (0, 30)


def test_a_dry_run_for_a_job_with_gpus_needs_none_here(monkeypatch):
    """A login node has none; `submit/slurm.py` says that the job will have them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = CONFIG.model_copy(update={"device": "cuda", "precision": "fp16"})
    with refuses("runtime.device: cuda was requested, but torch sees no GPU"):
        choose_runtime(wanted)
    monkeypatch.setenv(GPUS_VARIABLE, "1")
    assert choose_runtime(wanted).precision == "fp16"


@pytest.mark.parametrize(
    "others, changes, variable, threads",
    [
        (2.4, {}, None, 6),
        (9.0, {}, None, 1),
        (0.4, {}, None, 8),
        (2.4, {"deterministic": True}, None, 8),
        (2.4, {"threads": 3}, None, 3),
        (2.4, {}, "8", 8),
    ],
)
def test_a_run_leaves_the_cores_that_others_use(others, changes, variable, threads, monkeypatch):
    monkeypatch.setattr("engine.update.runtime.cores_of_others", lambda: others)
    monkeypatch.setattr("engine.update.runtime._set_backends", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(8)
    try:
        choose_runtime(CONFIG.model_copy(update={"threads": None, **changes}))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_a_resumed_run_has_the_threads_of_its_first_start(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.start.count_cores", lambda: 4)
    keep_threads(tmp_path / "environment.json")  # a first start
    assert torch.get_num_threads() == 1
    for before, now in ((3, 3), (64, 4)):
        (tmp_path / "environment.json").write_text(f'{{"threads": {before}}}')
        keep_threads(tmp_path / "environment.json")
        found = torch.get_num_threads()
        torch.set_num_threads(1)
        assert found == now
