"""A record of each step's samples (`tracking.samples=true`), to audit exactness or explain loss spikes.

    samples/rank_00000.jsonl    {"step": 12, "ids": [...], "keys": [...], "hash": "..."}, one row per step

`hash` covers every tensor of the step's batches: equal hashes mean equal augmented samples. It costs a host
synchronisation per step.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from utils.io.files import AppendFile
from utils.io.weights import hash_tensors
from utils.ranks import distributed
from utils.record.metrics_log import keep_rows


class SampleLog(AppendFile):
    """One rank's record. All ranks create theirs together."""

    def __init__(self, folder: Path, last_step: int) -> None:
        folder = folder / "samples"
        folder.mkdir(exist_ok=True)
        if distributed.is_main():
            for path in folder.glob("rank_*.jsonl"):
                keep_rows(path, last_step)
        distributed.barrier()
        super().__init__(folder / f"rank_{distributed.rank():05d}.jsonl")

    def add(self, step: int, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Record the micro-batches of step number `step` (from 1)."""
        row = {
            "step": step,
            "ids": [number for batch in batches for number in batch["sample_id"].tolist()],
            "keys": [number for batch in batches for number in batch["key"].tolist()],
            "hash": hashlib.sha256("".join(hash_tensors(batch) for batch in batches).encode()).hexdigest()[:16],
        }
        self.write(json.dumps(row) + "\n")
