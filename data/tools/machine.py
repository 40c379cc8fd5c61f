"""job=machine: what this machine can do, and what a training would refuse here."""

import re
import shutil
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import nn

from data.config import DataConfig
from data.images.open import decoder_versions
from data.layouts.names import is_remote
from data.layouts.walk import check_root
from data.tools.config import Machine
from utils.errors import UserError
from utils.hardware import check_compile, choose_device, choose_precision, free_memory, missing_for_compile
from utils.io.files import output_errors
from utils.ranks.processes import count_cores
from utils.record.logging import log

_GIB = 2**30
_PRECISIONS = (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", None))  # two are for GPUs
_WHY = {
    "bf16": "the device multiplies bf16 faster than float32",
    "fp16": "a GPU that does not multiply bf16 faster",
    "fp32": "a CPU that does not multiply bf16 faster",
}
_IMAGES = 4
_UPDATES = 3  # the last one is timed: the first ones are slow


def describe_machine(job: Machine, data: DataConfig) -> str:
    """Log what there is. Raises UserError with all that a training would refuse."""
    device = choose_device("cpu" if job.device == "cpu" else "auto")
    log.info("cpu: %d cores, %.1f GiB of memory free", count_cores(), free_memory() / _GIB)
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        log.info("cuda:%d: %s, %.1f GiB", number, about.name, about.total_memory / _GIB)
    precision = choose_precision("auto", device)
    log.info("runtime.precision=auto: trains in %s: %s", precision, _WHY[precision])
    _time_steps(device)
    lacks = ", ".join(missing_for_compile(device))
    log.info("torch.compile: %s", f"not possible without {lacks}" if lacks else "possible")
    log.info("decoders: %s", decoder_versions())
    for file in sorted(Path(__file__).parents[2].glob("requirements*.txt")):
        names = re.findall(r"^[\w.-]+", file.read_text(), re.MULTILINE)
        lacks = ", ".join(name for name in names if not [*distributions(name=name)])
        log.info("%s: %s", file.name, f"lacks {lacks}" if lacks else "installed")
    checks = [(choose_device, job.device), (choose_precision, job.precision, device)]
    checks += [(check_compile, device)] * (job.compile is True)
    checks += [(check_root, data.root)] * (data.name != "glyphs" and not is_remote(data.root))
    refused = []
    for check, *arguments in (*checks, (_check_writable, Path(job.run_dir))):
        try:
            check(*arguments)
        except UserError as error:
            refused.append(str(error))
    for folder in filter(Path.is_dir, (Path("/dev/shm"), Path(job.run_dir))):
        usage = shutil.disk_usage(folder)
        log.info("%s: %.1f of %.1f GiB free", folder, usage.free / _GIB, usage.total / _GIB)
    if refused:
        raise UserError("a training would be refused here:\n  " + "\n  ".join(refused))
    return "nothing that a training would refuse"


def _time_steps(device: str) -> None:
    """Log the images per second of updates of a small network, in each precision that the device trains in."""
    network = nn.TransformerEncoderLayer(384, 6, device=device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    images = torch.rand(196, _IMAGES, 384, device=device)
    for name, dtype in _PRECISIONS[: None if device == "cuda" else 2]:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        for _ in range(_UPDATES):
            started = time.perf_counter()
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = network(images).square().mean()
            loss.backward()
            optimizer.step()
            network.norm2.bias.sum().item()  # waits for the device
            rate = _IMAGES / (time.perf_counter() - started)
        log.info("%s: %.3g images/s (a layer of ViT-S, %d images of 224 px)", name, rate, _IMAGES)


def _check_writable(folder: Path) -> None:
    """Raise UserError (`run_dir`) if a run cannot write there."""
    with output_errors("run_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
