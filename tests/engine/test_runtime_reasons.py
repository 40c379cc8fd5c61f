"""The start-up lines say what is on and why; CUDA's are made here without a GPU."""

from dataclasses import replace

import pytest
import torch

from engine import runtime_reasons as module
from engine.runtime import Runtime
from engine.runtime_reasons import runtime_reasons
from tests.in_process import configure

CPU = Runtime(torch.device("cpu"), "bf16", False, 0, 4)
GPU = replace(CPU, device=torch.device("cuda"), channels_last=True, workers=7)


def lines(monkeypatch, runtime, *overrides, native=True, missing=(), compiles=False, steps=1000):
    monkeypatch.setattr(module, "has_bf16", lambda device: native)
    monkeypatch.setattr(module, "missing_for_compile", lambda device: list(missing))
    config, _ = configure("train", [f"runtime.{override}" for override in overrides])
    found = runtime_reasons(config.runtime, runtime, compiles=compiles, total_steps=steps)
    return {line.partition("=")[0]: line for line in found}


@pytest.mark.parametrize(
    "runtime, overrides, more, key, said",
    [
        (CPU, [], {}, "precision", "precision=bf16 (auto): this CPU multiplies bf16 natively"),
        (
            replace(CPU, precision="fp32"), ["precision=fp32"], {}, "precision",
            "precision=fp32 (as configured): this CPU multiplies bf16 natively: runtime.precision=bf16 would give 1.4",
        ),
        (
            replace(CPU, precision="fp32"), [], {"native": False}, "precision",
            "precision=fp32 (auto): this CPU has no bf16 arithmetic",
        ),
        (
            CPU, ["precision=bf16"], {"native": False}, "precision",
            "precision=bf16 (as configured): this CPU has no bf16 arithmetic, so fp32 is faster here",
        ),
        (
            replace(GPU, precision="fp16"), [], {"native": False}, "precision",
            "precision=fp16 (auto): this GPU has fp16, and no bf16 arithmetic",
        ),
        (CPU, [], {"compiles": True}, "compile", "compile=on (auto): 1000 steps pay for compiling"),
        (CPU, [], {"steps": 100}, "compile", "compile=off (auto): 100 steps do not pay for it; 300 would"),
        (CPU, [], {"missing": ["a compiler"]}, "compile", "compile=off (auto): it needs a compiler, not found here"),
        (
            CPU, ["compile=false"], {}, "compile",
            "compile=off (as configured): 1000 steps would pay for it (from 300 on); runtime.compile=auto turns it on",
        ),
        (CPU, ["deterministic=true"], {}, "compile", "compile=off (auto): runtime.deterministic=true"),
        (GPU, [], {}, "tf32", "tf32=on: float32 products that remain use tensor cores"),
        (GPU, ["precision=fp32"], {}, "tf32", "tf32=off: runtime.precision=fp32 asks for exact float32"),
        (GPU, [], {}, "channels_last", "channels_last=on (auto): convolutions on tensor cores want it"),
        (CPU, [], {}, "workers", "workers=0 (auto): on a CPU, training needs the cores itself"),
        (GPU, [], {}, "workers", "workers=7 (auto): a share of this machine's cores per GPU"),
    ],
)  # fmt: skip
def test_each_choice_has_its_reason(monkeypatch, runtime, overrides, more, key, said):
    assert lines(monkeypatch, runtime, *overrides, **more)[key].startswith(said)


def test_tf32_is_a_matter_of_gpus(monkeypatch):
    assert list(lines(monkeypatch, CPU)) == ["precision", "compile", "channels_last", "workers"]
    assert list(lines(monkeypatch, GPU)) == ["precision", "tf32", "compile", "channels_last", "workers"]
