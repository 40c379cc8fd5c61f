"""Probe the machine and resolve the settings that are `auto`."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from engine.config import MachineConfig, RuntimeConfig, TrainingConfig
from utils.contracts import LoaderMachine
from utils.hardware import check_compile, choose_device, choose_precision, choose_workers, missing_for_compile
from utils.ranks import distributed
from utils.record.logging import log, setup_logging
from utils.start import cores_of_others

# runtime.compile=auto compiles a run on a GPU that has at least these steps, or these `loop.minutes`. Measured on an
# H200, beside CUDA graphs: 41 s of compilation save half of a step of convnextv2_atto at 224 px (6.7 ms), and 21 s a
# quarter of one of ResNet-18 at 128 px (1.0 ms). Both pay after 90 s of training. On a CPU it saves a third of a step
# or costs a tenth, by network (docs/benchmarks.md).
COMPILE_PAYS_FROM = {"steps": 6000, "minutes": 4.0}
_EVALUATION_PREFETCH = 2  # batches per worker process
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime(LoaderMachine):
    """The resolved settings: the machine, and the precision of the forward pass."""

    precision: str

    def autocast(self) -> AbstractContextManager:
        """Return a new context for a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    @property
    def device_name(self) -> str:
        """The name of the device, such as `NVIDIA H200`."""
        return "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def describe(self) -> str:
        """Return the settings in one line."""
        return (
            f"device={self.device} precision={self.precision} "
            f"channels_last={self.channels_last} workers={self.workers} threads={torch.get_num_threads()}"
        )


def choose_compile(config: TrainingConfig, device: str, total_steps: int) -> bool:
    """Return whether to compile; `auto` does on a GPU, if possible and if the run is long enough to benefit.

    With `loop.minutes`, the minutes decide, because the number of steps is not known yet. Raises UserError if
    compilation was requested and is not possible.
    """
    compiles = config.runtime.compile
    if compiles is True:
        check_compile(device)
    if compiles != "auto":
        return compiles
    pays = total_steps >= COMPILE_PAYS_FROM["steps"]
    if config.loop.minutes is not None:
        pays = config.loop.minutes >= COMPILE_PAYS_FROM["minutes"]
    return device == "cuda" and pays and not config.runtime.deterministic and not missing_for_compile(device)


def chooses_threads(config: MachineConfig) -> bool:
    """Return whether the run may choose the number of threads: no key, variable or launcher sets it.

    Threads wait for each other at the end of each operation, so a thread that shares its core with another process
    holds up all threads. A deterministic run does not depend on other processes.
    """
    given = config.threads is not None or "OMP_NUM_THREADS" in os.environ
    return not given and not config.deterministic and distributed.world_size() == 1


def start_machine(config: MachineConfig) -> Runtime:
    """Start the process group and logging, and resolve the settings for this machine."""
    distributed.init_process_group(choose_device(config.device), config.hang_timeout_sec)
    setup_logging()
    return choose_runtime(config)


@contextmanager
def warming(device: torch.device) -> Iterator[None]:
    """Start a GPU in a thread meanwhile: the context, cuBLAS and cuDNN, whose first calls take seconds.

    The thread ignores errors: the main thread will meet them. Nothing may fork inside the context.
    """

    def start() -> None:
        ones = torch.ones(1, 16, 16, 16, device=device, dtype=torch.bfloat16)
        torch.conv2d(ones @ ones, ones)

    with ThreadPoolExecutor(1) as thread:
        if device.type == "cuda":
            thread.submit(start)
        yield


def _set_backends(config: MachineConfig, device: str) -> None:
    """Set determinism and TF32 explicitly, because a notebook may run several runs in one process.

    TF32 is off in a deterministic run, and with precision=fp32, which is the reference.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    if device != "cuda":
        return
    # torch reads this once per process, before the first deterministic matrix product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not config.deterministic
    precision = "ieee" if config.deterministic or config.precision == "fp32" else "tf32"
    # Setting matmul.fp32_precision would make the older names, which libraries read, raise an error.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.conv.fp32_precision = precision


def choose_trained(config: MachineConfig, precision: str | None) -> Runtime:
    """Return the settings for weights: `auto` takes the precision of their run, or fp32 for fp16 on a CPU."""
    if config.precision == "auto" and precision in _DTYPES:
        precision = "fp32" if precision == "fp16" and choose_device(config.device) == "cpu" else precision
        config = config.changed({"precision": precision})
    return choose_runtime(config)


def choose_runtime(config: MachineConfig) -> Runtime:
    """Set threads and determinism, and return the settings. Raises UserError for what this machine cannot do."""
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif device == "cpu" and chooses_threads(config) and (others := round(cores_of_others())):
        torch.set_num_threads(max(1, torch.get_num_threads() - others))
        log.info("runtime.threads: %d, because other processes use %d cores", torch.get_num_threads(), others)
    _set_backends(config, device)
    precision = choose_precision(config.precision, device)
    channels_last = config.channels_last
    if channels_last == "auto":  # figures of a CPU: docs/benchmarks.md
        channels_last = device == "cuda" or precision == "bf16"
    return Runtime(
        device=torch.device("cuda", distributed.local_device_index()) if device == "cuda" else torch.device("cpu"),
        precision=precision,
        channels_last=channels_last,
        workers=choose_workers(config.workers, device),
        prefetch_batches=config.prefetch_batches if isinstance(config, RuntimeConfig) else _EVALUATION_PREFETCH,
    )
