"""What the page starts: one file with the commands in their order, and a process and a log for each.

The log is a command's state, so a kill at any moment loses nothing and starts nothing twice. A command waits until its
log has text. It is alive while the log is locked: its process holds the lock, which ends with it.
"""

import fcntl
import os
import re
import shlex
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, Popen
from sys import executable

import psutil

from utils.config.help import ROOT
from utils.errors import UserError
from utils.io.files import file_lock, is_locked, output_errors, read_json, write_json
from utils.record.run_index import is_own_run
from utils.record.run_reader import RunReader

TRAININGS = ("train.py", "finetune_sdxl.py")
_STAMP = re.compile(r"-\d{6}-\d{6}\b")  # in the name of a run
_PATIENCE_SEC = 10.0  # for another process that changes the queue
# What a command is, its words on lines. READ, WRITTEN: folders; names below them are neither hidden nor odd.
_COMMAND = (
    r"((train|finetune_sdxl|prepare)\.py(\n((data\.root|model\.path)=(READ)(/[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*)*"
    r"|(run_dir|job\.report)=WRITTEN(/\w[\w.-]*)+|task=tagging|experiment=sdxl/lora|job=labels"
    r"|task\.buckets\.(areas_px=\[\d+\]|min_px=\d+)|task\.samples\.image_size_hw=\[\d+,\d+\]"
    r"|loop\.minutes=\d+(\.\d+)?|data\.trigger=WORDS|task\.samples\.prompts=\[\"WORDS\"\]))*"
    r"|(evaluate|export)\.py(\n(run_dir=WRITTEN(/\w[\w.-]*)+|calibrate=true|per_image=true|split=(test|val)"
    r"|format=(onnx|wd14)))*)?"
)


def folder_of(words: Sequence[str]) -> Path:
    """Return the folder that a command writes."""
    return Path(next(word.split("=", 1)[1] for word in words if word.startswith(("run_dir=", "job.report="))))


class Queue:
    """The commands. roots: the page reads below them; runs: the folder that they write; may_start: `view.start`."""

    def __init__(self, roots: Sequence[Path], runs: Path, *, may_start: bool) -> None:
        self.roots = roots
        self.runs = runs
        self.may_start = may_start
        self._folder = runs / ".queue"
        read = "|".join(map(re.escape, map(str, roots)))
        self._command = (
            _COMMAND.replace("READ", read)
            .replace("WORDS", "[A-Za-z][A-Za-z0-9_ -]*")
            .replace("WRITTEN", re.escape(str(runs)))
        )

    def takes(self, words: Sequence[str]) -> bool:
        """Return whether the page may start a command."""
        return bool(re.fullmatch(self._command, "\n".join(words)))

    def check(self, words: Sequence[str]) -> None:
        """Raise UserError for a command that the page may not start."""
        if not self.takes(words):
            places = ", ".join(map(str, self.roots))
            raise UserError(
                f"data.root: the page does not take {shlex.join(words[1:])}; it takes the settings that it offers, and "
                f"folders below {places} that are not hidden; python view.py data.root=PATH adds another"
            )

    def lines(self, name: str) -> list[str]:
        """Return the lines of a command's log."""
        log = self._log(name)
        return log.read_text(errors="replace").splitlines() if log.exists() else []

    def state(self, name: str, words: Sequence[str]) -> str:
        """Return `waiting`, `running` or `stopping`; later the state of a training, or `ended`."""
        folder = folder_of(words)
        log = self._log(name)
        if is_locked(log):
            return "stopping" if log.with_suffix(".stop").exists() else "running"
        if not self.lines(name):
            return "waiting"
        is_training = words[0] in TRAININGS and is_own_run(folder)
        return RunReader(folder).state if is_training else "ended"

    def is_busy(self) -> bool:
        """Return whether a command runs."""
        return any(map(is_locked, self._folder.glob("*.log")))

    def entries(self) -> list[list]:
        """Return all commands: name (nanoseconds since 1970) and words."""
        file = self._folder / "queue.json"
        return read_json(file) if file.exists() else []

    def act(self, name: str = "", act: str = "", words: Sequence[str] = ()) -> list[list]:
        """Do what a button says, start the next command, and return all: name (nanoseconds since 1970) and words.

        `Add` adds words. The other acts are on a command by its name, if it is still there: `Stop` does what Ctrl-C
        does, so a run saves, and once more, so it leaves at once; `Start again` lets a run go on; `Remove`; any other
        one moves it to the front. Raises UserError: `view.start`, `runs`, or the key of a word that is not allowed.
        """
        if not self.may_start:
            raise UserError("view.start: the page starts nothing; it needs view.start=true and view.host=127.0.0.1")
        self.check(words)
        refusal = f"runs: another process keeps {self._folder}/lock; end it, or wait"
        with output_errors("runs", self._folder), file_lock(self._folder / "lock", refusal, _PATIENCE_SEC):
            entries = sorted(self.entries(), key=lambda entry: entry[0] != name)
            words = dict(entries).get(name, words)
            if is_locked(self._log(name)):
                if act == "Stop":
                    self._log(name).with_suffix(".stop").touch()
                    for process in psutil.process_iter():
                        with suppress(psutil.Error, ProcessLookupError):  # not ours, ended, or not first of its session
                            if process.cmdline()[1:] == words:
                                os.killpg(process.pid, signal.SIGINT)
            elif words:
                if act in ("Remove", "Start again"):
                    del entries[0]
                if act == "Start again" or act == "Add" and not self.awaits(words):
                    entries.append([str(time.time_ns()), words])
                write_json(self._folder / "queue.json", entries)
            waiting = [entry for entry in entries if not self.lines(entry[0])]
            if waiting and not self.is_busy():
                self._start(*waiting[0])
            return entries

    def awaits(self, words: Sequence[str]) -> bool:
        """Return whether a command waits or runs. New runs whose names differ by the time alone are of two clicks."""
        stamp = "" if folder_of(words).exists() else _STAMP
        equal = [
            name for name, known in self.entries() if re.sub(stamp, "", str(known)) == re.sub(stamp, "", str([*words]))
        ]
        return any(not self.lines(name) or is_locked(self._log(name)) for name in equal)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _start(self, name: str, words: Sequence[str]) -> None:
        with self._log(name).open("ab") as log:
            if not self.takes(words):  # another view.py may read other folders, and the file may be edited
                log.write(b"the page does not take this command now\n")
                return
            fcntl.flock(log, fcntl.LOCK_EX)  # the process inherits it
            Popen([executable, *words], cwd=ROOT, stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True)
            log.write(b"started\n")
