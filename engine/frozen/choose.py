"""Choose a frozen network for features of a collection: one that has not seen the labels, if there is one.

frozen = choose_frozen(None, collection, runtime)
"""

import math
from contextlib import suppress
from pathlib import Path

import torch

from data.collection.collection import Collection
from engine.config import MACHINE
from engine.exports.predictors import load_predictor
from engine.fold import fold_norms
from engine.frozen.features import PIXELS, Frozen
from engine.update.runtime import Runtime, choose_runtime
from models.config import Pretrained, timm_config
from models.image_model import ImageModel, torch_predictor
from models.normalise import Normalise
from models.weights.offers import NETWORKS, list_weights
from models.weights.timm_hub import load_timm, stated_preprocessing
from utils.errors import UserError, about
from utils.io.memo import OURS, hash_once
from utils.io.weight_files import find_weights
from utils.io.weights import hash_tensors
from utils.record.logging import log
from utils.record.run_index import find_runs
from utils.record.run_reader import RunReader, run_of

_RUNS = Path("outputs")
_HASHES = OURS / "weight_hashes.jsonl"
CPU_PX = 96  # a third of the usual side takes an eleventh of the time; on a GPU, decoding takes most


def choose_cpu() -> Runtime:
    """Return the CPU, for a page: a GPU may be training."""
    return choose_runtime(MACHINE.changed({"device": "cpu"}))


def choose_frozen(
    weights: str | None, collection: Collection, runtime: Runtime, key: str, pretrained: Pretrained = "auto"
) -> Frozen:
    """Return a network for features, and log its name.

    weights: a run or a file that the user names by the configuration key `key`. Without it, the network is timm's
    strongest with weights in the cache or, by `pretrained`, on the hub, else the newest FCMAE run on the collection,
    else `PIXELS`. Raises UserError (`key`) for weights that cannot be used.
    """
    frozen = None
    if weights is not None:
        with about(key):
            frozen = _open_own(find_weights(weights, "best"), collection, runtime)
    for name in _list_strongest(runtime.device.type, pretrained) if frozen is None else ():
        try:
            frozen = open_frozen_timm(name, runtime)
            break
        except UserError as error:  # a damaged file, or a preprocessing that cannot be stated
            log.info("features: %s is skipped: %s", name, error)
    if frozen is None and (run := _find_fcmae(collection)) is not None:
        frozen = _open_own(RunReader(run).weights("last"), collection, runtime)
    frozen = frozen or PIXELS
    log.info("features of %s", frozen.says)
    return frozen


def _list_strongest(device: str, pretrained: Pretrained) -> list[str]:
    """Return networks of timm with weights, the costliest that suits the device first: it is the strongest."""
    most_cost = NETWORKS["machines"][device]["most_cost"]
    costs = {name: row["cost"] for name, row in NETWORKS["weights"].items() if row["cost"] <= most_cost}
    names = list_weights("cached", most_cost, math.inf) or list_weights(pretrained, most_cost, math.inf)
    return sorted(names, key=lambda name: -costs.get(name, 0.0))


def open_frozen_timm(name: str, runtime: Runtime) -> Frozen:
    """Return a network of timm with weights. On a CPU, images have at most `CPU_PX`.

    Raises UserError if the weights, or the preprocessing that timm states, cannot be used.
    """
    stated = stated_preprocessing(timm_config(name))
    if runtime.device.type == "cpu":
        stated["image_size_hw"] = [min(CPU_PX, side) for side in stated["image_size_hw"]]
    network = load_timm(name, num_classes=0)
    if runtime.channels_last:
        network = network.to(memory_format=torch.channels_last)
    version = hash_tensors(network.state_dict())
    network = fold_norms(network, torch.zeros(1, 3, *stated["image_size_hw"]))
    model = ImageModel(network, Normalise(stated["mean"], stated["std"], 3), "features").eval()
    metadata = {"output": "features", "weights_hash": version, "preprocessing": {**stated, "channels": 3}}
    says = f"timm's {name} at {stated['image_size_hw'][0]} px, which has never seen these labels"
    return Frozen(torch_predictor(model, metadata, runtime.device), version, says)


def _open_own(path: Path, collection: Collection, runtime: Runtime) -> Frozen:
    """Return the network of a weight file. It is blind if its run trained without labels or on other images."""
    predictor = load_predictor(path, runtime.device)
    run = run_of(path)
    is_blind = run is not None and (_trains_blind(run) or not _trains_on(run, collection))
    seen = "has not seen these labels" if is_blind else "may have trained on these labels, so it agrees with wrong ones"
    return Frozen(predictor, hash_once(path, _HASHES), f"{path}, which {seen}")


def _find_fcmae(collection: Collection) -> Path | None:
    """Return the newest FCMAE run on the collection that has weights."""
    times = {}
    for path in find_runs([_RUNS]):
        run = RunReader(path)
        with suppress(UserError):  # a damaged run
            if _trains_blind(run) and _trains_on(run, collection):
                times[path] = run.weights("last").stat().st_mtime
    return max(times, key=times.__getitem__, default=None)


def _trains_blind(run: RunReader) -> bool:
    return run.config.get("script") == "pretrain_fcmae"


def _trains_on(run: RunReader, collection: Collection) -> bool:
    """Return whether a run trains on the folder of the collection."""
    return Path(run.config.get("data", {}).get("root", "")).resolve() == Path(collection.root).resolve()
