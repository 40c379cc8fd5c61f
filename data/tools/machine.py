"""job=machine: what this machine can do, how fast it multiplies, and what a training would refuse here."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from PIL import Image

from data.config import DataConfig
from data.images.decode import Decoder, decoder_versions
from data.images.open import FORMATS
from data.layouts.folders import check_root
from data.layouts.remote import is_remote
from data.stream.source import UnreadableImage
from data.tools.tool import Tool, save_report
from utils.config.help import ROOT
from utils.config.schema import PathText
from utils.errors import UserError
from utils.hardware import (
    check_compile,
    choose_device,
    choose_precision,
    free_memory,
    measure_speeds,
    missing_for_compile,
)
from utils.io.files import output_errors
from utils.io.safe_text import Lines
from utils.ranks.processes import count_cores
from utils.record.figures import show_rows
from utils.record.logging import get_logger

log = get_logger(__name__)

_GIB = 2**30
_PACKAGES = ("requirements.txt", "requirements-sdxl.txt", "requirements-cloud.txt")


class Machine(Tool):
    """Describe the machine. device, precision, compile: of `runtime`, as a training would need them."""

    name: Literal["machine"]
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: Literal["auto"] | bool
    run_dir: PathText
    report: PathText

    def run(self, data: DataConfig) -> str:
        """List and measure. Raises UserError with all that a training would refuse."""
        refused, device = [], choose_device("cpu" if self.device == "cpu" else "auto")
        needs_folder = data.name != "glyphs" and not is_remote(data.root)
        for check in (
            lambda: choose_device(self.device),
            lambda: choose_precision(self.precision, device),
            lambda: check_compile(device) if self.compile is True else None,
            lambda: check_root(data.root) if needs_folder else None,
            lambda: _check_writable(Path(self.run_dir)),
        ):
            try:
                check()
            except UserError as error:
                refused.append(str(error))
        devices = {"cpu": f"{count_cores()} cores, {free_memory() / _GIB:.1f} GiB of memory free"}
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            devices[f"cuda:{number}"] = f"{about.name}, {about.total_memory / _GIB:.1f} GiB"
        speeds = {f"{name} {kind}": v for name in devices for kind, v in measure_speeds(torch.device(name)).items()}
        lacks, formats = missing_for_compile(device), ", ".join(_missing_formats())
        products = {f"matrix products, {name}": f"{1000 * speed:,.0f} GFLOPS" for name, speed in speeds.items()}
        found = devices | products | {
            "runtime.precision=auto": f"trains in {choose_precision('auto', device)}",
            "torch.compile": f"not possible without {', '.join(lacks)}" if lacks else "possible",
            "decoders": f"{decoder_versions()}; {f'cannot read {formats}' if formats else 'all formats'}",
            **{name: _compare_packages(ROOT / name) for name in _PACKAGES},
        }  # fmt: skip
        for name, folder in {"shared memory": "/dev/shm", "disk of job.run_dir": self.run_dir}.items():
            if Path(folder).is_dir():
                usage = shutil.disk_usage(folder)
                found[name] = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
        rows = [{"what": name, "found": text} for name, text in found.items()]
        log.info("%s", Lines(show_rows(rows)))
        page = save_report(Path(self.report) / self.name, device, speeds, {"machine": rows}, {})
        if refused:
            raise UserError("a training would be refused here:\n  " + "\n  ".join(refused))
        return f"nothing that a training would refuse; {page}"


def _check_writable(folder: Path) -> None:
    """Raise UserError (`run_dir`) if a run cannot write there."""
    with output_errors("run_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _missing_formats() -> Iterator[str]:
    """Yield the image formats that cannot be written and read back here."""
    for form in FORMATS:
        try:
            Image.new("RGB", (16, 16)).save(content := io.BytesIO(), form)
            Decoder(3, 256)(content.getvalue(), form)
        except (OSError, KeyError, UnreadableImage):
            yield form


def _compare_packages(file: Path) -> str:
    """Return the packages of a requirements file that are missing or of another version."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    others = []
    for wanted in map(Requirement, filter(None, lines)):
        if wanted.marker is None or wanted.marker.evaluate():
            try:
                has = version(wanted.name)
            except PackageNotFoundError:
                has = "none"
            if has == "none" or not wanted.specifier.contains(has, prereleases=True):
                others.append(f"{wanted.name}{wanted.specifier} (here: {has})")
    return f"missing or of another version: {', '.join(others)}" if others else "all packages are here"
