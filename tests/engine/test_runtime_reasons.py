"""The start-up lines say what is on and why; CUDA's are made here without a GPU."""

from dataclasses import replace

import pytest
import torch

from engine import runtime_reasons as module
from engine.runtime import Runtime
from engine.runtime_reasons import _CPU_COMPILE, runtime_reasons
from tests.in_process import TINY, configure, make_images, run

CPU = Runtime(torch.device("cpu"), "bf16", False, 0, 4)
GPU = replace(CPU, device=torch.device("cuda"), channels_last=True, workers=7)
CPU_FORMAT = (
    "on a CPU some networks gain from it and others lose (three with small images: 0.88 to 1.12 times the speed)"
)
OLD, SHORT, LONG = {"native": False}, {"steps": 2}, {"steps": 5000}


def lines(monkeypatch, runtime, *overrides, native=True, missing=(), compiles=False, steps=1000):
    monkeypatch.setattr(module, "has_fast_bf16", lambda device: native)
    monkeypatch.setattr(module, "missing_for_compile", lambda device: list(missing))
    config, _ = configure("train", [f"runtime.{override}" for override in overrides])
    found = runtime_reasons(config.runtime, runtime, compiles=compiles, total_steps=steps)
    return {line.partition("=")[0]: line for line in found}


@pytest.mark.parametrize(
    "runtime, chosen, overrides, more, said",
    [
        (CPU, "bf16", [], {}, "(auto): this CPU multiplies bf16 faster than float32"),
        (CPU, "fp32", [], OLD, "(auto): this CPU has no fast bf16 arithmetic"),
        (
            CPU, "fp32", ["precision=fp32"], {},
            "(as configured): this CPU multiplies bf16 faster than float32: runtime.precision=bf16 would "
            "give 0.9 to 1.5 times the speed, measured on two cores",
        ),
        (
            CPU, "bf16", ["precision=bf16"], OLD,
            "(as configured): this CPU has no fast bf16 arithmetic, so fp32 is faster here",
        ),
        (GPU, "bf16", [], {}, "(auto): this GPU multiplies bf16 faster than float32"),
        (GPU, "fp16", [], OLD, "(auto): this GPU has fp16, and no fast bf16 arithmetic"),
        (GPU, "fp16", ["precision=fp16"], {}, "(as configured): bf16 is as fast here and needs no loss scale"),
        (
            GPU, "fp32", ["precision=fp32"], {},
            "(as configured): this GPU multiplies bf16 faster than float32: runtime.precision=bf16 would "
            "give products in a twelfth of the time, on paper for an H200",
        ),
        (
            GPU, "fp32", ["precision=fp32"], OLD,
            "(as configured): this GPU has no fast bf16 arithmetic; runtime.precision=auto would take fp16",
        ),
        (
            GPU, "bf16", ["precision=bf16"], OLD,
            "(as configured): this GPU has no fast bf16 arithmetic, so fp16 is faster here",
        ),
    ],
)  # fmt: skip
def test_precision(monkeypatch, runtime, chosen, overrides, more, said):
    found = lines(monkeypatch, replace(runtime, precision=chosen), *overrides, **more)
    assert found["precision"] == f"precision={chosen} {said}"


@pytest.mark.parametrize(
    "overrides, more, said",
    [
        ([], {}, "on: float32 products that remain use tensor cores; runtime.precision=fp32 turns it off"),
        ([], OLD, "off: this GPU has none"),
        (["precision=fp32"], {}, "off: runtime.precision=fp32 asks for exact float32; tensor cores need "
                                 "runtime.precision=auto"),
        (["deterministic=true"], {}, "off: runtime.deterministic=true asks for exact float32; tensor cores need "
                                     "runtime.deterministic=false"),
        (["precision=fp32", "deterministic=true"], {},
         "off: runtime.precision=fp32 and runtime.deterministic=true asks for exact float32; tensor cores need "
         "runtime.precision=auto and runtime.deterministic=false"),
    ],
)  # fmt: skip
def test_tf32(monkeypatch, overrides, more, said):
    assert lines(monkeypatch, GPU, *overrides, **more)["tf32"] == f"tf32={said}"


@pytest.mark.parametrize(
    "runtime, compiles, overrides, more, said",
    [
        (GPU, True, [], LONG, "(auto): 5000 steps pay for compiling: it takes about as long as 3000 steps save"),
        (GPU, True, ["compile=true"], {"steps": 3000},
         "(as configured): 3000 steps pay for compiling: it takes about as long as 3000 steps save"),
        (GPU, True, ["compile=true"], {}, "(as configured): 1000 steps are too few to pay for it (from 3000 on)"),
        (GPU, False, [], {"steps": 100}, "(auto): 100 steps do not pay for it; 3000 would"),
        (GPU, False, [], {"missing": ["a compiler", "Python's headers"], **LONG},
         "(auto): it needs a compiler and Python's headers, not found here; compiling would save 10 to 20 ms of a "
         "step, estimated"),
        (GPU, False, [], {"missing": ["a compiler"], **SHORT}, "(auto): it needs a compiler, not found here"),
        (GPU, False, ["compile=false"], LONG,
         "(as configured): 5000 steps would pay for it (from 3000 on: it saves 10 to 20 ms of a step, estimated); "
         "runtime.compile=auto turns it on"),
        (GPU, False, ["deterministic=true"], LONG,
         "(auto): runtime.deterministic=true; compiling would save 10 to 20 ms of a step, estimated"),
        (CPU, False, [], {}, f"(auto): {_CPU_COMPILE}"),
        (CPU, False, [], {"missing": ["a compiler"]}, "(auto): it needs a compiler, not found here"),
        (CPU, True, ["compile=true"], {},
         "(as configured): some networks lose from it on a CPU; compare with runtime.compile=false"),
    ],
)  # fmt: skip
def test_compile(monkeypatch, runtime, compiles, overrides, more, said):
    found = lines(monkeypatch, runtime, *overrides, compiles=compiles, **more)
    assert found["compile"] == f"compile={'on' if compiles else 'off'} {said}"


@pytest.mark.parametrize(
    "runtime, override, said",
    [
        (GPU, "auto", "on (auto): convolutions on tensor cores want it"),
        (GPU, "false", "off (as configured): convolutions on tensor cores want it; runtime.channels_last=auto turns it "
                       "on"),
        (CPU, "auto", f"off (auto): {CPU_FORMAT}; try runtime.channels_last=true"),
        (CPU, "true", f"on (as configured): {CPU_FORMAT}"),
    ],
)  # fmt: skip
def test_memory_format(monkeypatch, runtime, override, said):
    runtime = replace(runtime, channels_last=said.startswith("on"))
    assert lines(monkeypatch, runtime, f"channels_last={override}")["channels_last"] == f"channels_last={said}"


@pytest.mark.parametrize(
    "runtime, workers, override, said",
    [
        (CPU, 0, "auto", "(auto): on a CPU, training needs the cores itself"),
        (CPU, 0, "0", "(as configured): on a CPU, training needs the cores itself"),
        (CPU, 2, "2", "(as configured): on a CPU, training needs the cores itself, so that runtime.workers=auto takes "
                      "none"),
        (GPU, 7, "auto", "(auto): a share of this machine's cores per GPU"),
        (GPU, 2, "2", "(as configured): a share of this machine's cores per GPU is what runtime.workers=auto takes"),
    ],
)  # fmt: skip
def test_workers(monkeypatch, runtime, workers, override, said):
    found = lines(monkeypatch, replace(runtime, workers=workers), f"workers={override}")
    assert found["workers"] == f"workers={workers} {said}; bench/loader.py measures other settings"


def test_tf32_is_a_matter_of_gpus(monkeypatch):
    assert list(lines(monkeypatch, CPU)) == ["precision", "compile", "channels_last", "workers"]
    assert list(lines(monkeypatch, GPU)) == ["precision", "tf32", "compile", "channels_last", "workers"]


def test_a_run_logs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.runtime.has_fast_bf16", lambda device: True)
    monkeypatch.setattr(module, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(module, "missing_for_compile", lambda device: [])
    overrides = [f"runtime.{key}=auto" for key in ("precision", "compile", "channels_last", "workers")]
    images = make_images(tmp_path / "images")
    run("finetune", [*TINY, *overrides, "runtime.deterministic=false", f"data.root={images}", "dry_run=true"], tmp_path)
    said = capsys.readouterr().err.splitlines()
    start = said.index("runtime: device=cpu precision=bf16 channels_last=False workers=0 threads=1 compile=False")
    assert said[start + 1 : start + 5] == [
        "  precision=bf16 (auto): this CPU multiplies bf16 faster than float32",
        f"  compile=off (auto): {_CPU_COMPILE}",
        f"  channels_last=off (auto): {CPU_FORMAT}; try runtime.channels_last=true",
        "  workers=0 (auto): on a CPU, training needs the cores itself; bench/loader.py measures other settings",
    ]
