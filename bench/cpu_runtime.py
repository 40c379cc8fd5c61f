"""What the choices of `runtime` gain on this CPU: milliseconds of an update of train.py, against auto's, in turns.

python bench/cpu_runtime.py [quick]           (on an idle machine; a quarter to half an hour on two cores)

Compiling itself, half a minute, is not in the figures. Because of them `runtime.compile=auto` compiles on GPUs only.
A CPU without bf16 arithmetic emulates it, many times slower than float32, so there bf16 is not tried.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.commands import update_ms
from bench.measure import describe_machine, row_of, write
from utils.hardware import has_fast_bf16

STEPS, TURNS = 60, 2
BASE = "bf16" if has_fast_bf16("cpu") else "fp32"  # what auto takes
OTHER = "fp32" if BASE == "bf16" else "bf16"
PRECISION = f"runtime.precision={BASE}"
SIDES = {
    f"eager {BASE}": [PRECISION],
    **({f"eager {OTHER}": [f"runtime.precision={OTHER}"]} if torch.cpu.get_capabilities().get("avx512_bf16") else {}),
    f"{BASE}, channels-last": [PRECISION, "runtime.channels_last=true"],
    f"{BASE}, compiled": [PRECISION, "runtime.compile=true"],
}
AT_64 = ["optim=adamw", "augment.image_size_hw=[64,64]", "loop.global_batch_size=64"]
NETWORKS = {
    "resnet18, 128 x 32 px": [],
    "convnextv2_atto, 64 x 64 px": ["model=convnextv2_atto", *AT_64],
    "timm's convnextv2_atto, 64 x 64 px": ["model=timm", "model.name=convnextv2_atto", *AT_64],
}


def main():
    quick = sys.argv[1:] == ["quick"]
    steps, turns = (10, 1) if quick else (STEPS, TURNS)
    networks, sides = list(NETWORKS.items())[: 1 if quick else None], list(SIDES.items())[: 2 if quick else None]
    fixed = ["runtime.device=cpu", "tracking.live_plots=false", *(["loop.global_batch_size=8"] if quick else [])]
    rows = []
    for number, (network, overrides) in enumerate(networks):
        found = {name: [] for name, _ in sides}
        for turn in range(turns):
            for index, (name, words) in enumerate(sides):
                place = f"cpu_runtime/{number}_{index}_{turn}"
                found[name].append(update_ms(place, steps, *overrides, *fixed, *words))
        rows += [row_of(network, found, name, sides[0][0]) for name, _ in sides[1:]]
    write("cpu_runtime", rows, machine=describe_machine(torch.device("cpu")), quick=quick)


if __name__ == "__main__":
    main()
