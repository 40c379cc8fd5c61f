"""Who may import whom (docs/design.md): every import statement of every file, those inside functions too, follows the
arrows between rooms; no module imports itself by a detour. The check itself is tested on planted wrong arrows.
"""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pkgutil import resolve_name

from engine.exports.config import FORMATS
from utils.config.help import ROOT

SCRIPT = "root scripts"  # the room of the files at the root
DATA = {f"data/{name}" for name in ("layouts", "collection", "validity", "stream", "images", "tags", "augment")}
ENGINE = {"optim", "engine", "engine/update", "engine/run", "engine/measures"}
# What each room may import beside itself. Root scripts are not a room: not even another script imports one.
ALLOWED = {
    "utils": set(),
    "models": {"utils"},
    "data": {"utils", "data/collection", "data/layouts", "data/stream", "data/images", "data/augment"},
    "data/layouts": {"utils"},
    "data/collection": {"utils", "data/layouts", "data/validity"},
    "data/validity": {"utils", "data/layouts", "data/collection", "data/images"},
    "data/stream": {"utils", "data/collection"},
    "data/images": {"utils", "data", "data/stream", "data/collection", "data/layouts"},
    "data/tags": {"utils", "data", "data/stream", "data/collection", "data/layouts"},
    "data/augment": {"utils", "data", "data/stream", "data/images"},
    "data/tools": {"utils", "data", *DATA},
    "optim": {"utils"},
    "engine/measures": {"utils", "optim"},
    "engine": {"utils", "optim"},
    "engine/update": {"utils", "optim", "engine"},
    "engine/run": {"utils", "optim", "engine", "engine/update"},
    "engine/tasks": {"utils", *ENGINE, "models", "data", *DATA},
    "engine/recipe": {"utils", *ENGINE, "engine/tasks", "engine/frozen", "models", "data", *DATA},
    "engine/frozen": {"utils", *ENGINE, "engine/tasks", "engine/exports", "models", "data", *DATA, "data/tools"},
    "engine/exports": {"utils", *ENGINE, "engine/tasks", "engine/judging", "models"},
    "engine/judging": {
        "utils",
        *ENGINE,
        "engine/tasks",
        "engine/exports",
        "engine/frozen",
        "engine/train",
        "models",
        "data",
        *DATA,
        "data/tools",
    },
    "engine/train": {"utils", *ENGINE, "engine/tasks", "engine/recipe", "models", "data", *DATA},
    "sdxl": {
        "utils",
        *ENGINE,
        "engine/tasks",
        "engine/recipe",
        "engine/exports",
        "engine/judging",
        "engine/frozen",
        "models",
        "data",
        *DATA,
        "data/tools",
    },
    "viewer": {"utils", "models", "data", *DATA, "data/tools", "engine/measures", "engine/frozen"},
    SCRIPT: {"utils", *ENGINE, "engine/tasks", "engine/recipe", "engine/exports", "engine/judging", "engine/frozen"}
    | {"engine/train", "models", "data", *DATA, "data/tools", "sdxl", "viewer"},
    "submit": {"utils"},
}
FREE = {"tests", "bench"}  # may import anything, and are imported by each other at most


def room_of(file):
    module = file.removesuffix(".py").removesuffix("/__init__")
    parts = module.split("/")
    if parts[0] in FREE or len(parts) > 1 or module in ALLOWED:
        inner = "/".join(parts[:2])
        return inner if inner in ALLOWED else parts[0]
    return SCRIPT


@cache
def read_graph(root):
    """Return file -> the files that it imports, as ruff finds them: statements anywhere, of files that git keeps."""
    command = [sys.executable, "-m", "ruff", "analyze", "graph", "--quiet", "."]
    return json.loads(subprocess.run(command, cwd=root, capture_output=True, check=True).stdout)


def find_wrong_arrows(root):
    wrong = []
    for file, target in ((file, target) for file, targets in read_graph(root).items() for target in targets):
        here, there = room_of(file), room_of(target)
        if here in FREE or (here == there and here != SCRIPT):
            continue
        if here not in ALLOWED:
            wrong.append(f"{file}: {here} is no room that tests/test_layering.py knows")
        elif there not in ALLOWED[here] and target.removesuffix(".py") not in ALLOWED[here]:
            wrong.append(f"{file}: {here} may not import {target}")
    return wrong


def find_cycle(root):
    """Return the files that import each other in a circle, or None."""
    try:
        TopologicalSorter(read_graph(root)).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_every_arrow_is_allowed():
    assert find_wrong_arrows(ROOT) == []


def test_no_module_imports_itself_by_a_detour():
    assert find_cycle(ROOT) is None


def test_every_name_in_a_table_exists():
    """The text `module:name` is opened on use (pkgutil.resolve_name); it is no arrow."""
    files = [file for file in read_graph(ROOT) if not file.startswith("tests/")]
    trees = [ast.parse((ROOT / file).read_text("utf-8")) for file in files]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {text for text in texts if isinstance(text, str) and re.fullmatch(r"(\w+\.)+\w+:\w+", text)}
    names |= {name for row in FORMATS.values() for name in (row.write, row.use) if name}
    assert len(names) > 30 and all(map(resolve_name, names))


def test_nothing_is_passed_over():
    """Every room is there with its files, and arrows that must exist are seen."""
    graph = read_graph(ROOT)
    assert set(ALLOWED) - {"submit"} | {"tests"} <= set(map(room_of, graph)) <= set(ALLOWED) | FREE
    assert "engine/tasks/kinds.py" in graph["finetune.py"] and "models/fcmae.py" in graph["engine/tasks/fcmae.py"]


def test_planted_wrong_arrows_and_circles_are_found(tmp_path):
    planted = {
        "utils/io/files.py": "import os\nimport torch.optim\nimport optim.build\n",
        "models/build.py": "def f():\n    from data.stream import loader\n",
        "data/stream/loader.py": "import engine.update.step\n",
        "engine/update/step.py": "import optim.build\n",
        "optim/build.py": "",
        "zoo/app.py": "import utils.io.files\n",
        "utils/a.py": "import utils.b\n",
        "utils/b.py": "def f():\n    from utils import a\n",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert find_wrong_arrows(tmp_path) == [
        "data/stream/loader.py: data/stream may not import engine/update/step.py",
        "models/build.py: models may not import data/stream/loader.py",
        "utils/io/files.py: utils may not import optim/build.py",
        "zoo/app.py: zoo is no room that tests/test_layering.py knows",
    ]
    assert find_cycle(tmp_path) is not None
