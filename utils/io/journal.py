"""The journal and lock of a command that writes many results: killed and typed again, the command goes on.

with open_journal("output", Path("found.jsonl"), key) as journal:
    done = [result for part in journal.parts() for result in part]
    for part in compute_all_but(done):
        journal.add(part)
    write_atomically(output, lambda file: write_all(file, journal.parts()))
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from utils.io.files import ANOTHER_PATH, file_lock, output_errors, remove_temporary


class Journal:
    """Parts of a result, one line of JSON each. A killed process leaves whole parts."""

    def __init__(self, path: Path, command: Any) -> None:
        """Keep the parts in the file if they are of the same command, a JSON value."""
        self.path = path
        header = _line({"command": command})
        size = 0
        with open(path, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or (size == 0 and line != header):
                    break
                size += len(line)
            file.truncate(size)
            file.seek(size)
            file.write(header if size == 0 else b"")
        self._header_size = len(header)

    def parts(self) -> Iterator[Any]:
        """Yield the parts."""
        with open(self.path, "rb") as file:
            file.seek(self._header_size)
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))  # a full disk cuts the last one

    def add(self, part: Any) -> None:
        """Append a part, a JSON value."""
        with open(self.path, "ab") as file:
            file.write(_line(part))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


@contextmanager
def open_journal(
    key: str, output: Path, command: Any = None, *, is_folder: bool = False, advice: str = ANOTHER_PATH
) -> Iterator[Journal]:
    """Lock an output and open its journal, which has parts if a command of the same description was killed.

    The journal's file is removed at the end, unless it has parts after an error. Raises UserError (`key`) if another
    process writes the output, or for a write error.
    """
    folder, name = (output, None) if is_folder else (output.parent, output.name)
    path = folder / (".journal" if is_folder else f".{name}.journal")
    is_new = not folder.exists()
    with output_errors(key, output, advice), ExitStack() as stack:
        refusal = f"{key}: another command is writing {output}; wait for it, or name another one"
        stack.enter_context(file_lock(path, refusal))
        remove_temporary([folder], name)
        journal = Journal(path, command)
        is_done = False
        try:
            yield journal
            is_done = True
        finally:
            if is_done or not any(journal.parts()):
                path.unlink()
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
