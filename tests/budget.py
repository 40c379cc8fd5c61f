"""Print what a reader must take in, room by room, beside tests/budget.toml; exit with 1 above a limit (`make lint`).

Python is counted in syntax nodes (`ast.walk`): lines invite packing two thoughts into one. In the program and bench/,
a statement has at most `STATEMENT` nodes, a tuple assignment joins only what belongs together, and a function is short.
`python tests/budget.py FOLDER` prints the nodes of each file below a folder.
"""

import ast
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

STATEMENT = 60  # nodes of a statement, or of the header of a compound one; tables of literals aside
LINES = 60  # of a function
PARAMETERS = 7  # of a function, without self

_LITERALS = (ast.Dict, ast.List, ast.Set, ast.Tuple)
_HEADERS = {
    ast.If: ["test"],
    ast.While: ["test"],
    ast.For: ["target", "iter"],
    ast.With: ["items"],
    ast.Match: ["subject"],
}
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Raise, ast.Assert, ast.Delete)


def count_nodes(tree):
    return sum(1 for _ in ast.walk(tree))


def belongs(path, pattern):
    """Return whether a file is in a room: `x/` has all Python files below x, `x/*.py` those of the folder itself."""
    if pattern.endswith("/"):
        return path.startswith(pattern)
    return fnmatch(path, pattern) and path.count("/") == pattern.count("/")


def list_files():
    """Return the project's Python files: tracked ones, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-coz", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    return sorted(name for name in set(listed.decode().split("\0")) if name and Path(name).is_file())


def is_table(statement):
    return isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, _LITERALS)


def is_packed(statement):
    """Return whether an assignment joins values that do not belong together.

    Together belong: the parts of one thing (`box.left, box.right`), and values that change places.
    """
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Tuple):
        return False
    targets = [target for target in statement.targets if isinstance(target, ast.Tuple)]
    if not targets:
        return False
    values = [ast.unparse(value) for value in statement.value.elts]
    if {ast.unparse(name) for name in targets[0].elts} & set(values):
        return False
    parts = [value for value in statement.value.elts if isinstance(value, (ast.Attribute, ast.Subscript))]
    return len(parts) < len(values) or len({ast.unparse(part.value) for part in parts}) > 1


def find_dense(tree):
    """Yield the line and the fault of each statement and function that a reader cannot take in in one pass."""
    scopes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef))]
    tables = {statement for scope in scopes for statement in filter(is_table, scope.body)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            names = [name for name in names if name not in ("self", "cls")]
            if lines > LINES:
                yield node.lineno, f"{node.name} has {lines} lines"
            if len(names) > PARAMETERS:
                yield node.lineno, f"{node.name} has {len(names)} parameters"
        if is_packed(node):
            yield node.lineno, "a tuple assignment joins values that do not belong together"
        nodes = 0
        if isinstance(node, _SIMPLE) and node not in tables:
            nodes = count_nodes(node)
        for field in _HEADERS.get(type(node), ()):
            parts = getattr(node, field)
            nodes += sum(count_nodes(part) for part in (parts if isinstance(parts, list) else [parts]))
        if nodes > STATEMENT:
            yield node.lineno, f"a statement of {nodes} nodes"


def main(arguments):
    """Print the table, or the nodes of the files below a folder; return the exit status."""
    rooms = tomllib.loads(Path("tests/budget.toml").read_text())["room"]
    trees = {file: ast.parse(Path(file).read_bytes()) for file in list_files()}
    nodes = {file: count_nodes(tree) for file, tree in trees.items()}
    if arguments:
        below = {file: count for file, count in nodes.items() if file.startswith(tuple(arguments))}
        for file, count in sorted(below.items(), key=lambda pair: pair[1]):
            print(f"{count:7,} {file}")
        return 0

    above, program = [], 0
    for room in rooms:
        count = sum(nodes[file] for file in nodes if any(belongs(file, pattern) for pattern in room["files"]))
        program += count if room.get("program", True) else 0
        mark = ""
        if count > room["nodes"]:
            above.append(room["name"])
            mark = "  <- above"
        print(f"{room['name']:32} {count:8,} of {room['nodes']:8,} nodes{mark}")
    print(f"{'the program':32} {program:8,}")
    if above:
        print(f"above their limit in tests/budget.toml: {', '.join(above)}: take something out")

    plain = {file: tree for file, tree in trees.items() if not file.startswith("tests/")}
    faults = [f"{file}:{line}: {fault}" for file, tree in plain.items() for line, fault in find_dense(tree)]
    print("\n".join(faults))
    return int(bool(above or faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
