"""The start-up lines: what each choice of `runtime` is, why, and what this machine would gain from another."""

from engine.config import RuntimeConfig
from engine.runtime import COMPILE_PAYS_AFTER_STEPS, Runtime, has_bf16, missing_for_compile

# Times the speed of eager float32, bf16 and compiled together, on two CPU cores (docs/benchmarks.md).
_CPU_GAIN = "1.4 to 1.6 times the speed, measured with compile on two cores"


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
    line, native = f"precision={runtime.precision} ({_origin(config.precision)}", has_bf16(runtime.device.type)
    what = "this GPU" if runtime.device.type == "cuda" else "this CPU"
    if runtime.precision == "bf16":
        reason = "multiplies bf16 natively" if native else "has no bf16 arithmetic, so fp32 is faster here"
        reason = f"{what} {reason}"
    elif runtime.precision == "fp16":
        reason = (
            "bf16 is as fast here and needs no loss scale" if native else f"{what} has fp16, and no bf16 arithmetic"
        )
    elif native:
        gain = _CPU_GAIN if runtime.device.type == "cpu" else "about twice the speed where products dominate"
        reason = f"{what} multiplies bf16 natively: runtime.precision=bf16 would give {gain}"
    else:
        reason = f"{what} has no bf16 arithmetic"
    return f"{line}): {reason}"


def _tf32(config: RuntimeConfig) -> str:
    """As `choose_runtime` sets it."""
    if not config.deterministic and config.precision != "fp32":
        return "tf32=on: float32 products that remain use tensor cores; runtime.precision=fp32 turns it off"
    why = "runtime.deterministic=true" if config.deterministic else "runtime.precision=fp32"
    return f"tf32=off: {why} asks for exact float32; runtime.precision=auto would use tensor cores"


def _compile(config: RuntimeConfig, runtime: Runtime, compiles: bool, total_steps: int) -> str:
    line = f"compile={'on' if compiles else 'off'} ({_origin(config.compile)})"
    device, pays = runtime.device.type, COMPILE_PAYS_AFTER_STEPS[runtime.device.type]
    if compiles:
        return f"{line}: {total_steps} steps pay for compiling, which takes the time of about {pays} steps' gain"
    if missing := missing_for_compile(device):
        return f"{line}: it needs {' and '.join(missing)}, not found here"
    if config.deterministic:
        return f"{line}: runtime.deterministic=true"
    if config.compile != "auto" and total_steps >= pays:
        return f"{line}: {total_steps} steps would pay for it (from {pays} on); runtime.compile=auto turns it on"
    return f"{line}: {total_steps} steps do not pay for it; {pays} would"


def _memory_format(config: RuntimeConfig, runtime: Runtime) -> str:
    line = f"channels_last={'on' if runtime.channels_last else 'off'} ({_origin(config.channels_last)})"
    if runtime.device.type == "cuda":
        return f"{line}: convolutions on tensor cores want it" + ("" if runtime.channels_last else "; set it to auto")
    return f"{line}: on a CPU some networks gain from it and others lose; try runtime.channels_last=true"


def _workers(config: RuntimeConfig, runtime: Runtime) -> str:
    line = f"workers={runtime.workers} ({_origin(config.workers)})"
    if runtime.device.type == "cpu":
        return f"{line}: on a CPU, training needs the cores itself; bench/loader.py measures other settings"
    return f"{line}: a share of this machine's cores per GPU; bench/loader.py measures other settings"
