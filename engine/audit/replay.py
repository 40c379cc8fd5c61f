"""Repeat segments of an audited run, and compare the result with the chain.

A segment lies between two links. It is repeated as the run's own command resumes, in a folder of its own, from the kept
checkpoint (the first one from nothing), with the run's ranks and threads. Every hash must be that of the chain, and
the recipe that of config.json. Where bits differ and the environment is another, the distance of the weights is
compared with `BOUND`, as a share of the repetition's own change of them: a forger could name a start that is far away.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.nn.utils import parameters_to_vector

from engine.audit.chain import FIRST, KEPT, STATE_FILE, STOP_VARIABLE, read_chain
from utils.config.help import ROOT
from utils.config.recipe import flatten, is_free
from utils.errors import UserError
from utils.io.files import Values, read_json, sha256_file
from utils.io.weights import hash_tensors, read_tensors
from utils.record.run_reader import CONFIG_FILE

BOUND = 0.001  # distance in another environment, in fp32; measured in docs/reliability.md
# Words of the command.
_REPLACED = ("run_dir=", "resume", "tracking", "sweep.", "runtime.threads=", "loop.checkpoint_mirror=")
_FREE = ("git", "command", "previous", "state", "script", "data.root")  # of process, link and configuration


def repeat(run: Path, start: Values, end: Values, words: Sequence[str]) -> str:
    """Repeat a segment, and return what it shows. words: more for the run's command.

    Raises UserError (`run_dir`) if it is not as the chain says.
    """
    kept, wanted = (run / KEPT / link["checkpoint"] for link in (start, end))
    title = f"{kept.name} to {wanted.name}"
    process = read_json(kept / STATE_FILE)["process"]
    launcher = []
    if process["world_size"] > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={process['world_size']}"]
    threads = f"runtime.threads={process['threads']}"
    script, *given = (word for word in process["command"] if not word.startswith(_REPLACED))
    with TemporaryDirectory(dir=run, prefix=".audit-") as scratch:
        made = Path(scratch, "checkpoints", wanted.name)
        if kept.name != FIRST:  # which is made anew
            shutil.copytree(kept, made.with_name(kept.name))
        for file in run.glob("minutes.json"):
            shutil.copy(file, scratch)
        command = [sys.executable, *launcher, str(ROOT / Path(script).name), *given, threads, *words]
        environment = {**os.environ, STOP_VARIABLE: wanted.name.removeprefix("step_")}
        done = subprocess.run(
            [*command, f"run_dir={scratch}", "tracking=jsonl"], env=environment, capture_output=True, text=True
        )
        if not made.is_dir():
            raise UserError(f"run_dir: {title} cannot be repeated:\n{done.stderr[-2000:]}")
        first, *_, last = read_chain(Path(scratch))
        state = read_json(made / STATE_FILE)
        now = {**state["process"], **last, **flatten(state["config"])}
        begun = Path(scratch, KEPT, kept.name)
        states = [read_tensors(folder / "weights.safetensors") for folder in (begun, wanted, made)]
    said = {**process, **end, **flatten(read_json(run / CONFIG_FILE))}
    differ = {name for name, value in said.items() if value != now.get(name) and not is_free(name, _FREE)}
    if first["hashes"] != start["hashes"]:  # elsewhere, only initial weights may differ
        differ.add("hashes" if kept.name == FIRST else "start")
    if sha256_file(kept / STATE_FILE) != start["state"] or hash_tensors(states[1]) not in end["hashes"]:
        differ.add("files")
    exact = differ - process.keys() - {"hashes"} | differ & {"code"}
    if not exact | differ & {"hashes"}:
        return f"{title} equal"
    before, after, again = (parameters_to_vector(state.values()) for state in states)
    distance = (again - after).norm() / (again - before).norm()
    shown = f"{title} differ in {', '.join(sorted(differ))}, the weights by {distance:.2g} of their change"
    is_elsewhere = not exact and differ != {"hashes"}
    if is_elsewhere and end["data"]["runtime.precision"] != "fp32":
        raise UserError(
            f"run_dir: {shown}: rounded to 16 bits, honest weights are as far away as forged ones; repeat it where the "
            "environment is that of the chain"
        )
    if not is_elsewhere or not distance < BOUND:
        raise UserError(f"run_dir: {shown}: this is not what the chain says")
    return shown
