"""Print the lines of each room beside its limit in tests/budget.toml; exit with 1 above a limit (`make lint`)."""

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

PROGRAM = ("root", "engine", "engine/tasks, exports", "models", "optim", "data", "utils", "submit", "viewer")


def belongs(path: str, pattern: str) -> bool:
    """Return whether a file is in a room: `x/` has all Python files below x, `x/*.py` those of the folder itself."""
    if pattern.endswith("/"):
        return path.startswith(pattern) and path.endswith(".py")
    if "**" in pattern:
        return fnmatch(path, pattern.replace("**", "*"))
    return fnmatch(path, pattern) and path.count("/") == pattern.count("/")


def count_lines(files: list[str], patterns: list[str]) -> int:
    """Return the lines of the files that any of the patterns takes."""
    chosen = [file for file in files if any(belongs(file, pattern) for pattern in patterns)]
    return sum(len(Path(file).read_bytes().splitlines()) for file in chosen)


def main() -> int:
    """Print the table; return the exit status."""
    rooms = tomllib.loads(Path("tests/budget.toml").read_text())["room"]
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
    files = [file for file in tracked if file and Path(file).is_file()]
    total, above = 0, []
    for room in rooms:
        lines = count_lines(files, room["files"])
        total += lines if room["name"] in PROGRAM else 0
        above += [room["name"]] if lines > room["limit"] else []
        marks = f", goal {room['goal']}" if "goal" in room else ""
        marks += "  <- above" if lines > room["limit"] else ""
        print(f"{room['name']:24} {lines:6} of {room['limit']:6} lines{marks}")
    print(f"{'the program':24} {total:6}")
    if above:
        print(
            f"above their limit in tests/budget.toml: {', '.join(above)}: remove lines, or raise the limit and say why"
        )
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
