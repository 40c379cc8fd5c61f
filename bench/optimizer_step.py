"""What an optimiser's update costs: our Adan and AdamW against those that timm's training script makes.

python bench/optimizer_step.py [quick]            (on an idle machine)

The parameters of two ConvNeXt V2, in groups with and without weight decay, gradients that stay; each side makes its
updates in turns. timm's at its defaults, and with the multi-tensor and fused forms that its --opt-kwargs reach.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.optim import create_optimizer_v2

from bench.measure import describe_machine, read_group, row_of, runtime_of, take_turns, write
from models.build import build_network
from models.config import ModelConfig
from optim.build import build_optimizer
from optim.config import OptimConfig
from optim.groups import build_groups, set_group_values
from optim.schedules import GroupValues

LR, WEIGHT_DECAY = 1e-4, 0.05
PEERS = {
    "adan": {"timm": {"opt": "adan"}, "timm foreach": {"opt": "adan", "foreach": True}},
    "adamw": {
        "timm": {"opt": "adamw"},
        "timm foreach": {"opt": "adamw", "foreach": True},
        "timm fused": {"opt": "adamw", "fused": True},
    },
}


def with_gradients(network):
    """Return a copy of a network whose parameters have gradients."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator) * 1e-3
        parameter.grad = torch.empty_like(parameter).copy_(values)
    return network


def make_sides(kind, network, steps):
    """Return a turn of `steps` updates for ours and for each peer."""
    config = read_group(OptimConfig, "optim", kind)
    ours = build_optimizer(config, build_groups(with_gradients(network), {}, config), LR)
    set_group_values(ours, GroupValues(LR, WEIGHT_DECAY))
    ours.found_inf = torch.zeros((), device=next(network.parameters()).device)  # as train_step sets it
    optimizers = {kind: ours}
    for name, arguments in PEERS[kind].items():
        optimizers[name] = create_optimizer_v2(with_gradients(network), lr=LR, weight_decay=WEIGHT_DECAY, **arguments)

    def turn(optimizer):
        def run():
            for _ in range(steps):
                optimizer.step()

        return run

    return {name: turn(optimizer) for name, optimizer in optimizers.items()}


def main():
    quick = sys.argv[1:] == ["quick"]
    device, rows = runtime_of("fp32").device, []
    for model in ["convnextv2_atto"] if quick else ["convnextv2_atto", "convnextv2_tiny"]:
        network = build_network(read_group(ModelConfig, "model", model), num_classes=1000).to(device)
        for kind in PEERS:
            steps = 2 if quick else 10
            found = take_turns(
                make_sides(kind, network, steps), steps=steps, warmup=1, turns=2 if quick else 9, device=device
            )
            rows += [row_of(model, found, kind, peer) for peer in PEERS[kind]]
    write("optimizer_step", rows, machine=describe_machine(device), quick=quick)


if __name__ == "__main__":
    main()
