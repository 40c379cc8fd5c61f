"""job=machine: what this machine can do, and what a training would refuse here."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.images.open import decoder_versions
from data.layouts.names import is_remote
from data.layouts.walk import check_root
from data.tools.config import Machine
from utils.errors import UserError
from utils.hardware import check_compile, choose_device, choose_precision, free_memory, missing_for_compile
from utils.io.files import output_errors
from utils.ranks.processes import count_cores
from utils.record.logging import get_logger

log = get_logger(__name__)

_GIB = 2**30


def describe_machine(job: Machine, data: DataConfig) -> str:
    """Log what there is. Raises UserError with all that a training would refuse."""
    device = choose_device("cpu" if job.device == "cpu" else "auto")
    log.info("cpu: %d cores, %.1f GiB of memory free", count_cores(), free_memory() / _GIB)
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        log.info("cuda:%d: %s, %.1f GiB", number, about.name, about.total_memory / _GIB)
    log.info("runtime.precision=auto: trains in %s", choose_precision("auto", device))
    lacks = ", ".join(missing_for_compile(device))
    log.info("torch.compile: %s", f"not possible without {lacks}" if lacks else "possible")
    log.info("decoders: %s", decoder_versions())
    refused = []

    def attempt(check: Callable[..., Any], *arguments: Any) -> None:
        try:
            check(*arguments)
        except UserError as error:
            refused.append(str(error))

    attempt(choose_device, job.device)
    attempt(choose_precision, job.precision, device)
    if job.compile is True:
        attempt(check_compile, device)
    if data.name != "glyphs" and not is_remote(data.root):
        attempt(check_root, data.root)
    attempt(_check_writable, Path(job.run_dir))
    for folder in filter(Path.is_dir, (Path("/dev/shm"), Path(job.run_dir))):
        usage = shutil.disk_usage(folder)
        log.info("%s: %.1f of %.1f GiB free", folder, usage.free / _GIB, usage.total / _GIB)
    if refused:
        raise UserError("a training would be refused here:\n  " + "\n  ".join(refused))
    return "nothing that a training would refuse"


def _check_writable(folder: Path) -> None:
    """Raise UserError (`run_dir`) if a run cannot write there."""
    with output_errors("run_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
