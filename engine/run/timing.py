"""Time a network's updates alone, on the machine as it is."""

from time import monotonic

import torch
from torch import Tensor, nn

from engine.update.runtime import Runtime

_WARM_UP_UPDATES = {"cpu": 1, "cuda": 3}  # the first ones are slow
_NETWORK_SEC = {"cpu": 0.5, "cuda": 0.3}  # of a network alone; on an idle GPU the times are equal


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_update(network: nn.Module, images: Tensor, runtime: Runtime) -> float:
    """Return the seconds of an update of a network by a batch of images, without the time to read images."""
    from engine.update.graphs import record_graph

    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def update() -> None:
        with runtime.autocast():
            loss = network(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_WARM_UP_UPDATES[runtime.device.type]):
        update()
    try:
        repeat, _ = record_graph(update, runtime.device)
    except RuntimeError:  # the network waits for the GPU, as its training will
        repeat = update
    started = monotonic()
    count = 0
    while monotonic() < started + _NETWORK_SEC[runtime.device.type]:
        repeat()
        wait_for(runtime.device)
        count += 1
    return (monotonic() - started) / count
