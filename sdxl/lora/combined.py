"""export.py with `lora` or `rank`: merge LoRAs, lower the rank of a LoRA, or make one of two checkpoints.

Source: kohya-ss/sd-scripts:networks/svd_merge_lora.py and extract_lora_from_models.py, which take a whole SVD.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from engine.exports.config import ExportConfig
from sdxl.exports import DTYPES
from sdxl.files.family import draw_networks
from sdxl.lora.changes import LayerChange
from sdxl.lora.files import read_lora
from sdxl.lora.lora import ADAPTED, find_layers, save_lora
from sdxl.networks import load_networks
from sdxl.pictures.painter import read_strength
from utils.config.entry_point import Job
from utils.errors import UserError
from utils.io.files import output_errors, write_atomically, write_json
from utils.io.weight_files import find_weights


def merge(sources: Sequence[tuple[Path, float]]) -> Iterator[tuple[str, Tensor, int]]:
    """Yield each layer, the sum of its changes in files, times a strength, and of their ranks. Raises UserError."""
    with torch.device("meta"):
        networks = draw_networks(tiny=False)
    loras = [(strength, read_lora(path, networks)) for path, strength in sources]
    for name, layer in find_layers(networks).items():
        own = [(strength, changes[name]) for strength, changes in loras if name in changes]
        if any("dora_scale" in change.tensors for _, change in own):
            raise UserError("lora: a DoRA's change depends on the base; merge it into one, by format=single_file")
        if own:
            yield name, sum(s * change.on(layer.weight) for s, change in own), sum(change.rank for _, change in own)


def extract(base: str, tuned: str) -> Iterator[tuple[str, Tensor, int]]:
    """Yield each layer that differs, its difference, and 0, of one network after another. Raises UserError."""
    for part in ADAPTED:
        before, after = (find_layers(load_networks(path, {part: torch.float32})) for path in (base, tuned))
        for name, layer in before.items():
            difference = after[name].weight - layer.weight
            if difference.any():
                yield name, difference, 0


def factorise(difference: Tensor, rank: int) -> tuple[LayerChange, float]:
    """Return the LoRA of a rank that is nearest to a difference [out, in, ...], and its error.

    The error is the norm of the lost part, as a share of the norm of the difference.
    Source: Halko et al. 2011 (arXiv 0909.4061), algorithm 5.1. With twice the columns, the
    error is within 1e-4 of SVD's.
    """
    matrix = difference.detach().flatten(1)
    rank = min(rank, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, min(2 * rank, *matrix.shape), niter=4)
    up = (left * values)[:, :rank].view(len(matrix), rank, *[1] * (difference.ndim - 2))
    down = right.T[:rank].view(rank, *difference.shape[1:])
    change = LayerChange({"lora_A.weight": down, "lora_B.weight": up}, float(rank))
    return change, float((matrix - change.matrix()).norm() / matrix.norm())


def write_combined(config: ExportConfig, job: Job) -> str:
    """Write the LoRA that is merged, made smaller or extracted, and errors.json, which has the error of each layer.

    Raises UserError for keys of other exports.
    """
    if config.format != "kohya":
        raise UserError(f"format: {config.format}, but lora and rank make a LoRA; set format=kohya")
    for key in ("card", "license", "author", "description", "trigger", "dry_run"):
        if attrgetter(key)(config):
            raise UserError(f"{key}: lora and rank write a LoRA without this; remove it")
    torch.manual_seed(0)
    if config.model.path and not config.lora:
        differences = extract(config.model.path, config.weights)
    else:
        sources = [(find_weights(name, "best"), strength) for name, strength in map(read_strength, config.lora)]
        differences = merge([(config.find(), 1.0), *sources])
    changes = {}
    errors = {}
    for name, difference, rank in differences:
        changes[name], errors[name] = factorise(difference, config.rank or rank)
    path = Path(config.output, "lora.safetensors")
    with output_errors("output", path):
        title = {"title": path.parent.name}
        write_atomically(path, lambda place: save_lora(place, changes, DTYPES[config.precision], title))
        write_json(path.with_name("errors.json"), errors)
    return f"wrote {path}: {len(errors)} layers, errors up to {max(errors.values(), default=0.0):.2g} (errors.json)"
