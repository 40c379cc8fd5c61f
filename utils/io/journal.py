"""What was measured of files, kept until a file changes: it is measured once, and a killed job loses a second."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from utils.io.files import ignore_write_errors, write_text


class Journal:
    """Values by file, JSON, in one file of lines that grows as they come; write errors are warnings.

    A value counts while the measured file has the same size and times of change. How it was measured belongs in the
    name of `cache`, so that another way begins another journal.
    """

    def __init__(self, cache: Path) -> None:
        self._cache, self._lines = cache, 0
        self._stream: TextIO | None = None
        self._entries: dict[str, tuple[list[int], Any]] = {}
        text = cache.read_text(encoding="utf-8", errors="replace") if cache.is_file() else ""
        self._start = "" if text.endswith("\n") else "\n"  # after a line that a kill has torn
        for line in text.split("\n"):
            try:
                file, version, value = json.loads(line)
            except (ValueError, TypeError):  # torn
                continue
            self._lines += 1
            self._entries[file] = version, value

    def find(self, file: str) -> Any:
        """Return what is known of a file as it is now, None for nothing."""
        version, value = self._entries.get(file, (None, None))
        return value if version is not None and version == _version(file) else None

    def add(self, file: str, value: Any) -> None:
        """Keep what was measured of a file."""
        if (version := _version(file)) is None:
            return
        self._lines += 1
        self._entries[file] = version, value
        with ignore_write_errors(self._cache):
            if self._stream is None:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                self._stream = open(self._cache, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed at the end)
                self._stream.write(self._start)
            self._stream.write(self._line(file))

    def close(self) -> None:
        """Rewrite the file where half of its lines count no more."""
        if self._stream is not None:
            self._stream.close()
        if self._lines > 2 * len(self._entries):
            with ignore_write_errors(self._cache):
                write_text(self._cache, "".join(map(self._line, self._entries)))

    def _line(self, file: str) -> str:
        return json.dumps([file, *self._entries[file]]) + "\n"


def _version(file: str) -> list[int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
