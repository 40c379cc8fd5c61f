"""Who may import whom (docs/design.md): every import statement of every file, those inside functions too, follows the
arrows between rooms; no module imports itself by a detour. The check itself is tested on planted wrong arrows.
"""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pkgutil import resolve_name

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


def list_files(root):
    """Return the project's own Python files; folders of tools and outputs begin with a dot or are made by runs."""
    skipped = {"outputs", "collections"}
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in skipped]
    folders = [path for path in folders if path.name[0] not in "._"]
    return sorted([*root.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))])


def module_of(file, root):
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    parts = module.split(".")
    if parts[0] in FREE or len(parts) > 1 or module in ALLOWED:
        inner = "/".join(parts[:2])
        return inner if inner in ALLOWED else parts[0]
    return SCRIPT


def list_imports(file, modules, root):
    """Yield (line, own module) of each import: statements anywhere, and import_module with a literal name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]  # a module of a room, or a part of one
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        for name in names:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                yield node.lineno, name


@cache
def read_arrows(root):
    """Return (file, line, module, imported module) of each import of one of our modules by another."""
    files = list_files(root)
    modules = {module_of(file, root) for file in files}
    modules |= {module.rpartition(".")[0] for module in modules if "." in module}
    return [
        (file.relative_to(root).as_posix(), line, module_of(file, root), target)
        for file in files
        for line, target in list_imports(file, modules, root)
        if target != module_of(file, root)
    ]


def find_wrong_arrows(root):
    wrong = []
    for file, line, module, target in read_arrows(root):
        here, there = room_of(module), room_of(target)
        if here in FREE or (here == there and here != SCRIPT):
            continue
        if here not in ALLOWED:
            wrong.append(f"{file}:{line}: {here} is no room that tests/test_layering.py knows")
        elif there not in ALLOWED[here] and target not in ALLOWED[here]:
            wrong.append(f"{file}:{line}: {here} may not import {target}")
    return wrong


def find_cycle(root):
    """Return the modules that import each other in a circle, or None."""
    graph = {}
    for _, _, module, target in read_arrows(root):
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_every_arrow_is_allowed():
    assert find_wrong_arrows(ROOT) == []


def test_no_module_imports_itself_by_a_detour():
    assert find_cycle(ROOT) is None


def test_every_name_in_a_table_exists():
    """The text `module:name` is opened on use (pkgutil.resolve_name); it is no arrow."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in list_files(ROOT) if "tests" not in file.parts]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {text for text in texts if isinstance(text, str) and re.fullmatch(r"(\w+\.)+\w+:\w+", text)}
    assert len(names) > 30 and all(map(resolve_name, names))


def test_nothing_is_passed_over():
    """Every room is there with its files, and arrows that must exist are seen."""
    arrows = {(module, target) for _, _, module, target in read_arrows(ROOT)}
    rooms = {room_of(module_of(file, ROOT)) for file in list_files(ROOT)}
    assert set(ALLOWED) - {"submit"} | {"tests"} <= rooms <= set(ALLOWED) | FREE
    assert {("finetune", "engine.tasks.kinds"), ("engine.tasks.fcmae", "models.fcmae")} <= arrows


def test_planted_wrong_arrows_and_circles_are_found(tmp_path):
    planted = {
        "utils/io/files.py": "import os\nimport torch.optim\nimport optim\n",
        "models/build.py": "def f():\n    from data.stream import loader\n",
        "data/stream/loader.py": "import_module('engine.update.step')\n",
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
        "data/stream/loader.py:1: data/stream may not import engine.update.step",
        "models/build.py:2: models may not import data.stream.loader",
        "utils/io/files.py:3: utils may not import optim",
        "zoo/app.py:1: zoo is no room that tests/test_layering.py knows",
    ]
    assert find_cycle(tmp_path) is not None
