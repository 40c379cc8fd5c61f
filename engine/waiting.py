"""What a run says of the time that it waited for data, and the setting that helps."""

from collections.abc import Mapping

from engine.runtime import Runtime, choose_workers

MUCH_WAITING = 0.1  # of the time of training; more is said at the end
_MANY_HITS = 0.9  # of those that a cache of all images could have


def describe_data(wait_share: float, readings: Mapping[str, float]) -> str:
    """Return the time waited and the readings of the caches in a line."""
    shown = [
        f"{name} {value:.0%}" if name.endswith("_rate") else f"{name} {value:,.3g}" for name, value in readings.items()
    ]
    return ", ".join([f"{wait_share:.0%} of the time was a wait for it", *shown])


def advise(runtime: Runtime, epochs: float, readings: Mapping[str, float]) -> str:
    """Return the setting that helps a run that waits for data. epochs: that this process has trained."""
    workers = choose_workers("auto", runtime.device.type)
    if runtime.workers < workers:
        return f"runtime.workers is {runtime.workers}, and the cores of a rank allow {workers}"
    if epochs < 2:
        return (
            "images were read once, so no cache could help: prepare.py job=pack puts many small files into shards that "
            "are read in sequence, and augment.shrink=true decodes large photographs no larger than crops need"
        )
    missed = 1.0
    for name in ("l1_hit_rate", "l2_hit_rate"):
        missed *= 1 - readings.get(name, 0.0)
    if 1 - missed < _MANY_HITS * (1 - 1 / epochs):
        return (
            f"{missed:.0%} of the images were decoded again: raise data.cache.memory_gib, or keep them on a disk "
            "(data.cache.disk_gib, prepare.py job=warm_cache)"
        )
    return "decoded images come from a cache, so augmentation takes the time: try augment.on_device=true"
