"""The plans of `loop.minutes` on GPUs that are not here, which docs/gpu.md has: simulated, not measured.

python -m bench.plans

The rules are the program's. Simulated are the seconds of each network, by the formula of models/weights/networks.yaml
with the GPU's own speeds, a start of 20 s, and a hub, of whose networks that come in time the largest tells most of
photographs of 500 px.
"""

import sys
from itertools import product
from types import SimpleNamespace
from unittest.mock import DEFAULT, patch

from engine.recipe import measurements, rules
from models.weights import offers

# FLOP/s of bf16 with sums in float32, and byte/s: NVIDIA's data sheets.
DEVICES = {"RTX 3060": (25e12, 0.36e12), "RTX 4090": (165e12, 1.01e12), "H100": (989e12, 3.35e12)}
GPU = offers.NETWORKS["machines"]["cuda"]
CASES = (1, 8), DEVICES, (1, 10, 60), (1000, 20_000, 1_000_000), ("auto", "never")


def show(ranks, device, minutes, images, pretrained):
    """Return a row of the table."""
    flops, bandwidth = DEVICES[device]

    def time_row(row, side, *_):
        return (5.1e9 * row["gmacs"] / flops + 55e6 * row["mactivations"] / bandwidth) * (side / 224) ** 2

    unit = time_row(GPU, 64) / GPU["cost"]
    reference = (51 * minutes - 20) * ranks / unit
    known = measurements.Measurements(images, 500, 448, True, images // 10, 0, False, reference, unit, True, GPU)
    config = SimpleNamespace(loop=SimpleNamespace(minutes=minutes), device=SimpleNamespace(type="cuda"))
    hub = patch.multiple(offers, cached_file=lambda _: None, cached_names=list, _fetch=DEFAULT)
    world = patch.object(measurements.distributed, "planned_world_size", return_value=ranks)
    with hub as asked, world, patch.object(rules, "time_row", time_row):
        measurements._find_weights(config, None, None, config, pretrained, known)
        for (name, row, _), _ in asked["_fetch"].call_args_list[:1]:
            network = measurements.Network(row | {"name": name}, time_row(row, 64) / unit, is_pretrained=True)
            known = measurements.replace(known, networks=[network])
        known = rules.time_candidates(known, None)
    name = rules.choose_network(known).row["name"].split(".")[0]
    return (
        f"| {ranks} x {device} | {minutes} | {images:,} | {pretrained} | {name}, {rules.choose_px(known)} px "
        f"| {rules.epochs_of(known):,.3g} |\n"
    )


if __name__ == "__main__":
    sys.stdout.writelines(show(*case) for case in product(*CASES))
