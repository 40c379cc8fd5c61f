"""What this machine's processors can do."""

import torch


def has_fast_bf16(device: str) -> bool:
    """Return whether this machine's CPU or GPU (`device`: cpu or cuda) multiplies bf16 faster than float32.

    Intel's CPUs with AMX have AVX-512's bf16, too, at half of float32's speed: a product of 2,048 x 2,048 takes 118 ms
    against 59. A virtual machine may hide AMX. AVX-512's float16 tells these CPUs from AMD's, whose bf16 is fast.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    found = torch.cpu.get_capabilities()
    return found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and not found.get("avx512_fp16", False))
