"""The start-up lines: what each choice of `runtime` is, why, and what this machine would gain from another."""

from engine.config import RuntimeConfig
from engine.runtime import COMPILE_PAYS_AFTER_STEPS, Runtime, missing_for_compile
from utils.hardware import has_fast_bf16

# CPU: bf16 against float32, both eager (docs/benchmarks.md). GPU: bounds of convnextv2_tiny with 128
# images on an H200, 51 ms of products in exact float32 and 4.3 in bf16; not yet measured.
_BF16_GAIN = {
    "cpu": "0.9 to 1.5 times the speed, measured on two cores",
    "cuda": "products in a twelfth of the time, on paper for an H200",
}
_COMPILE_GAIN = "10 to 20 ms of a step, estimated"  # on a GPU
_CPU_COMPILE = (
    "on a CPU some networks gain from it and others lose, after half a minute of compiling (timm's ConvNeXt V2 atto at "
    "64 px: 1.3 to 1.5 times the speed; ours: 0.95 to 1.03; ResNet-18 at 32 px: 0.9 to 1.1): try runtime.compile=true"
)
# Training, eager, against channels-first (docs/benchmarks.md, Choices of runtime on a CPU).
_CPU_CHANNELS_LAST = "(three with small images: 0.88 to 1.12 times the speed)"


def runtime_reasons(config: RuntimeConfig, runtime: Runtime, *, compiles: bool, total_steps: int) -> list[str]:
    """Return a line for each choice: precision, TF32 (GPU), compile, memory format, loader processes."""
    lines = [_precision(config, runtime)]
    if runtime.device.type == "cuda":
        lines.append(_tf32(config))
    return [*lines, _compile(config, runtime, compiles, total_steps), _memory_format(config, runtime),
            _workers(config, runtime)]  # fmt: skip


def _origin(value: object) -> str:
    return "auto" if value == "auto" else "as configured"


def _precision(config: RuntimeConfig, runtime: Runtime) -> str:
    device = runtime.device.type
    line, is_fast = f"precision={runtime.precision} ({_origin(config.precision)})", has_fast_bf16(device)
    what, faster = ("this GPU", "fp16") if device == "cuda" else ("this CPU", "fp32")
    has = f"{what} multiplies bf16 faster than float32" if is_fast else f"{what} has no fast bf16 arithmetic"
    if runtime.precision == "bf16":
        return f"{line}: {has}" if is_fast else f"{line}: {has}, so {faster} is faster here"
    if runtime.precision == "fp16":
        reason = "bf16 is as fast here and needs no loss scale"
        return f"{line}: {reason if is_fast else f'{what} has fp16, and no fast bf16 arithmetic'}"
    if is_fast:
        return f"{line}: {has}: runtime.precision=bf16 would give {_BF16_GAIN[device]}"
    advice = "; runtime.precision=auto would take fp16" if device == "cuda" else ""
    return f"{line}: {has}{advice}"


def _tf32(config: RuntimeConfig) -> str:
    """As `choose_runtime` sets it; GPUs have had TF32 for as long as bf16."""
    if not has_fast_bf16("cuda"):
        return "tf32=off: this GPU has none"
    exact = {}
    if config.precision == "fp32":
        exact["runtime.precision=fp32"] = "runtime.precision=auto"
    if config.deterministic:
        exact["runtime.deterministic=true"] = "runtime.deterministic=false"
    if exact:
        return (
            f"tf32=off: {' and '.join(exact)} asks for exact float32; tensor cores need {' and '.join(exact.values())}"
        )
    return "tf32=on: float32 products that remain use tensor cores; runtime.precision=fp32 turns it off"


def _compile(config: RuntimeConfig, runtime: Runtime, compiles: bool, total_steps: int) -> str:
    line = f"compile={'on' if compiles else 'off'} ({_origin(config.compile)})"
    device = runtime.device.type
    pays = COMPILE_PAYS_AFTER_STEPS.get(device)
    if compiles and pays is None:
        return f"{line}: some networks lose from it on a CPU; compare with runtime.compile=false"
    if compiles and total_steps < pays:
        return f"{line}: {total_steps} steps are too few to pay for it (from {pays} on)"
    if compiles:
        return f"{line}: {total_steps} steps pay for compiling: it takes about as long as {pays} steps save"
    gain = f"; compiling would save {_COMPILE_GAIN}" if pays is not None and total_steps >= pays else ""
    if missing := missing_for_compile(device):
        return f"{line}: it needs {' and '.join(missing)}, not found here{gain}"
    if pays is None:
        return f"{line}: {_CPU_COMPILE}"
    if config.deterministic:
        return f"{line}: runtime.deterministic=true{gain}"
    if config.compile != "auto" and total_steps >= pays:
        return (
            f"{line}: {total_steps} steps would pay for it (from {pays} on: it saves {_COMPILE_GAIN}); "
            "runtime.compile=auto turns it on"
        )
    return f"{line}: {total_steps} steps do not pay for it; {pays} would"


def _memory_format(config: RuntimeConfig, runtime: Runtime) -> str:
    line = f"channels_last={'on' if runtime.channels_last else 'off'} ({_origin(config.channels_last)})"
    if runtime.device.type == "cuda":
        advice = "" if runtime.channels_last else "; runtime.channels_last=auto turns it on"
        return f"{line}: convolutions on tensor cores want it{advice}"
    advice = "" if runtime.channels_last else "; try runtime.channels_last=true"
    return f"{line}: on a CPU some networks gain from it and others lose {_CPU_CHANNELS_LAST}{advice}"


def _workers(config: RuntimeConfig, runtime: Runtime) -> str:
    line = f"workers={runtime.workers} ({_origin(config.workers)})"
    if runtime.device.type == "cpu":
        reason = "on a CPU, training needs the cores itself"
        advice = ", so that runtime.workers=auto takes none" if runtime.workers else ""
    else:
        reason = "a share of this machine's cores per GPU"
        advice = "" if config.workers == "auto" else " is what runtime.workers=auto takes"
    return f"{line}: {reason}{advice}; bench/loader.py measures other settings"
