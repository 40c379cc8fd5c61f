"""Shards against single files on a disk that answers slowly: images a second of our loader, nothing in the page cache.

python bench/slow_disk.py [quick]    (as root, on Linux; pip install mfusepy; apt-get install libfuse3-3; ten minutes)

The disk is a FUSE file system of this file, which hands on what another folder holds, and makes each request wait 5 ms.
All else is the kernel's: its page cache, its read-ahead (up to 1 MiB a request, as NFS and SATA disks take), and what
ours asks it for. `file server` answers any number of requests at a time: a look-up of a name, an open and a read are
one each. `one head` answers them one after another: look-ups and reads. Each turn mounts anew, so that nothing is
cached; the first 768 images, before which reading ahead is not under way, are not counted. Files are JPEGs of
500 x 375, about 90 kB. The same cores decode them and serve the disk.
"""

import ctypes.util
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ["FUSE_LIBRARY_PATH"] = ctypes.util.find_library("fuse3") or ""
import mfusepy
import torch

from bench.loader import read_arguments, say
from bench.loader_rivals import OFF, SIZE_PX, write_images
from bench.measure import OUT, describe_machine
from data.device_augment import training_views
from data.image_data import ImageData, load_collection
from data.images import open_images
from data.loader import no_fields
from data.pack import pack_collection
from data.stream import build_sampler
from utils.text_table import align_columns

DELAY_SEC, BATCH = 0.005, 128
SIDES = (("files", "shuffled"), ("shards", "shuffled"), ("shards", "blocks"))
_WARMUP = 6  # batches: more than are read ahead
_FOREVER_SEC = 1e6  # the kernel keeps names and attributes, as it does of a local disk
_REQUESTS = 64  # that the disk takes at a time
_FOLDERS = 16  # of the images: FUSE looks up one name of a folder at a time
_DETACH = 2  # sys/mount.h: MNT_DETACH
AT_ONCE = {"file server": _REQUESTS, "one head": 1}


class SlowDisk(mfusepy.Operations):
    """The files of a folder; each request waits."""

    def __init__(self, folder, at_once):
        self._folder, self._slots, self._is_server = folder, threading.Semaphore(at_once), at_once > 1

    def init_with_config(self, conn_info, config_3):
        """Let the kernel read ahead with as many requests as it likes."""
        conn_info.max_background = _REQUESTS

    def _wait(self):
        with self._slots:
            time.sleep(DELAY_SEC)

    def getattr(self, path, fh=None):
        """Return what stat does."""
        self._wait()
        found = os.stat(f"{self._folder}{path}")
        return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}

    def open(self, path, flags):
        """Return a descriptor."""
        if self._is_server:
            self._wait()
        return os.open(f"{self._folder}{path}", flags)

    def read(self, path, size, offset, fh):
        """Return bytes."""
        self._wait()
        return os.pread(fh, size, offset)

    def release(self, path, fh):
        """Close a descriptor."""
        os.close(fh)


def serve(folder, mount, at_once):
    """Answer requests until the disk is unmounted."""
    mfusepy.FUSE(
        SlowDisk(folder, at_once), mount, foreground=True, ro=True, kernel_cache=True, max_threads=_REQUESTS,
        entry_timeout=_FOREVER_SEC, attr_timeout=_FOREVER_SEC,
    )  # fmt: skip


@contextmanager
def mounted(folder, mount, at_once):
    """Mount a folder as a slow disk."""
    server = multiprocessing.get_context("fork").Process(target=serve, args=(str(folder), str(mount), at_once))
    server.start()
    while not os.path.ismount(mount):
        time.sleep(0.01)
    device = os.stat(mount).st_dev
    Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text("1024")
    try:
        yield
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(mount), _DETACH)
        server.join()


def our_batches(collection, config, sampling, workers):
    """Return the steps of our training stream of a collection."""
    machine = SimpleNamespace(device=torch.device("cpu"), channels_last=False, workers=workers, prefetch_batches=2)
    data = ImageData(
        collection, open_images(collection, config.data, 3, "white"), machine, seed=0, batch_size=BATCH, run_path=None
    )
    rows = collection.rows("train")
    loader = data.train(
        rows, no_fields, training_views(config.augment), sampler=build_sampler(sampling, rows, collection, 0)
    )
    return loader.steps(
        0, SimpleNamespace(world_size=1, global_batch_size=BATCH, micro_batch_size=BATCH, accum_steps=1)
    )


def images_per_sec(batches, count, seconds):
    """Return the rate at which images come once reading ahead is under way, for an epoch or some seconds of it."""
    for _ in range(_WARMUP):
        next(batches)
    started, read = time.perf_counter(), 0
    while read + _WARMUP * BATCH < count and time.perf_counter() - started < seconds:
        next(batches)
        read += BATCH
    rate = read / (time.perf_counter() - started)
    batches.close()
    return rate


def make_collections(out, count):
    """Write images as files and as shards; return the collection of each, and the configuration of a run."""
    for number in range(_FOLDERS):
        write_images(out / f"files/{number}", count // _FOLDERS, (500, 375), "jpg")
    words = ["data.validation_fraction=0", *(f"data.cache.{key}={value}" for key, value in OFF.items())]
    words += ["augment=light", "augment.interpolation=bilinear", f"augment.image_size_hw=[{SIZE_PX},{SIZE_PX}]"]
    collections = {}
    for name in ("files", "shards"):
        config, _, _ = read_arguments([f"data.root={out / name}", *words])
        collections[name] = load_collection(config.data)
        if name == "files":
            pack_collection(collections[name], out / "shards", 256, lambda done, total: None)
    return collections, config


def main():
    quick = "quick" in sys.argv[1:]
    torch.set_num_threads(1)
    out = OUT / ("quick/slow_disk" if quick else "slow_disk")
    count, seconds, turns = (8 * BATCH, 2, 1) if quick else (32 * BATCH, 20, 3)
    shutil.rmtree(out, ignore_errors=True)
    mount = out / "mount"
    mount.mkdir(parents=True)
    collections, config = make_collections(out, count)
    found = {(disk, workers, *side): [] for disk in AT_ONCE for workers in (0, 2) for side in SIDES}
    for _ in range(turns):
        for disk, workers, kind, sampling in found:
            collection = collections[kind]
            collection.root = mount
            with mounted(out / kind, mount, AT_ONCE[disk]):
                batches = our_batches(collection, config, sampling, workers)
                found[disk, workers, kind, sampling].append(images_per_sec(batches, count, seconds))
    rows = [("disk", "workers", "kept as", "loop.sampling", "images/s", "least to greatest", "times files")]
    for (disk, workers, *side), rates in found.items():
        ratio = statistics.median(ours / files for ours, files in zip(rates, found[disk, workers, *SIDES[0]]))
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows.append((disk, str(workers), *side, f"{statistics.median(rates):,.0f}", spread, f"{ratio:.2f}"))
    about = {"machine": describe_machine(torch.device("cpu")), "quick": quick}
    (out.with_suffix(".json")).write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    say(align_columns(rows))
    say(str(out.with_suffix(".json")))


if __name__ == "__main__":
    main()
