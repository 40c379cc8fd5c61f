"""The chain of an audited run: hashes of its kept checkpoints, each of which commits to all before it.

    chain.jsonl                     a link for each kept checkpoint
    audit/step_00000100/            its files, as in checkpoints/

A link has the hash of a checkpoint's state.json, which names its process, and in the open the
fingerprints of the data and the hashes of what a repetition must make again: the best weights, the rest of the state,
and each file of tensors. A run that is resumed with another command, code or environment has a link at that step,
so a segment has one of each. What lies between two links can be repeated (engine/audit/replay.py). The head, the hash
of the last link, is what to publish.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch.backends.cpu import get_cpu_capability

from utils.config.help import ROOT
from utils.errors import UserError
from utils.io.files import (
    Json,
    Values,
    canonical_json,
    link_or_copy,
    read_json,
    readable,
    sha256_file,
    sha256_text,
    write_text,
)
from utils.io.weights import hash_tensors, read_tensors
from utils.record.logging import get_logger
from utils.record.run_folder import environment_state

log = get_logger(__name__)

CHAIN_FILE = "chain.jsonl"
AUDIT_FILE = "audit.json"  # the verdict
KEPT = "audit"  # the folder of the kept checkpoints
FIRST = "step_00000000"
STATE_FILE = "state.json"
STOP_VARIABLE = "ATELIER_STOP_AT_STEP"  # of a repeated segment: save and stop there
STOPS_AT = int(os.environ.get(STOP_VARIABLE, -1))
_REPEATED = ("optimizer", "best", "gain", "found_lr", "last_evaluated", "origin")  # of state.json, beside the step
_CODE = ("*.py", "conf/**/*.yaml", "data/**/*.py", "engine/**/*.py", "models/**/*.py", "optim/**/*.py", "utils/**/*.py")


def describe_process() -> Json:
    """Return what the bits of a run depend on beside its data: command, code and environment."""
    files = [sha256_file(file) for pattern in _CODE for file in sorted(ROOT.glob(pattern))]
    cpu = [file.read_text().partition("stepping")[0] for file in Path("/proc").glob("cpuinfo")]  # model and vendor
    return environment_state(cpu=[*cpu, get_cpu_capability()], code=sha256_text(" ".join(files)))


def head_of(links: Sequence[Values]) -> str:
    """Return the hash of the last link, which the next one, and whoever publishes the chain, states."""
    return sha256_text(canonical_json(links[-1:]))


def read_chain(run: Path) -> list[Json]:
    """Return the links of a run; none without a chain.

    Raises UserError (`run_dir`) if one does not follow the one before it.
    """
    file = run / CHAIN_FILE
    links: list[Json] = []
    with readable(file, "chain"):
        for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
            link = json.loads(line)
            if link["previous"] != head_of(links):
                raise UserError(f"run_dir: a link of {file} does not follow the one before it: the chain was changed")
            links.append(link)
    return links


def read_verdict(run: Path, digest: str | None) -> Json:
    """Return audit.json if it is of the run's chain as it is now, and this has the weights with a hash; else {}."""
    for file in run.glob(AUDIT_FILE):
        verdict = read_json(file)
        links = read_chain(run)
        if digest and digest in str(links) and verdict["chain"] == head_of(links):
            return verdict
    return {}


def add_link(run: Path, checkpoint: Path) -> None:
    """Keep a checkpoint, and append its link, which replaces those of an earlier continuation."""
    size = 0
    for file in checkpoint.iterdir():
        link_or_copy(file, run / KEPT / checkpoint.name / file.name)
        size += file.stat().st_size
    if checkpoint.name == FIRST:
        log.info("loop.audit_every: each checkpoint in %s takes %.1f MB", run / KEPT, size / 1e6)
    links = [link for link in read_chain(run) if link["checkpoint"] < checkpoint.name]
    state = read_json(checkpoint / STATE_FILE)
    rest = sha256_text(canonical_json([checkpoint.name, *map(state.get, _REPEATED)]))
    tensors = (read_tensors(checkpoint / name) for name in state["checksums"])
    link = {
        "checkpoint": checkpoint.name,
        "previous": head_of(links),
        "state": sha256_file(checkpoint / STATE_FILE),
        "hashes": [state["best"]["weights"], rest, *map(hash_tensors, tensors)],
        "data": state["fingerprints"],
    }
    links.append(link)
    write_text(run / CHAIN_FILE, "".join(f"{canonical_json(link)}\n" for link in links))
