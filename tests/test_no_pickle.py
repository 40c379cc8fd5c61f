"""Nothing in the house unpickles, evaluates text, or unpacks an archive: every call in every room, by its syntax tree.

The check itself is tested on planted calls.
"""

import ast

from tests.test_layering import FREE, list_files
from utils.config.help import ROOT

# Modules whose import is enough to ask why.
_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile"}
# What may stand where: format=pth; the error that torch raises for a pickle it refuses.
ALLOWED = {
    ("data/pack.py", "import tarfile"): "shards are written, and their members listed",
    ("data/webdataset.py", "import tarfile"): "members are listed and read in place; none is extracted",
    ("models/export/targets.py", "torch.save"): "format=pth; tensors and one text",
}
# torch.save is among them: what is written is safetensors, JSON, Arrow, PNG and text.
_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save", "torch.jit.load", "torch.hub.load",
    "np.save", "numpy.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pd.read_pickle", "pandas.read_pickle",
    "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pickle.Unpickler", "shutil.unpack_archive",
}  # fmt: skip
_METHODS = {"extractall", "read_pickle", "to_pickle"}


def _name(node, aliases):
    """Return the dotted name of what is called as its module has it, `?` if it is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _find_aliases(tree):
    """Return the full name of each name that an import gives, anywhere in a module."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return aliases


def _given(call, name):
    return next((getattr(word.value, "value", "?") for word in call.keywords if word.arg == name), None)


def find_unsafe(source):
    """Return `what` of each unsafe line of a source, with its line."""
    found, tree = [], ast.parse(source)
    aliases = _find_aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(f"import {name.name}", node.lineno) for name in node.names if name.name in _MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in _MODULES:
            found.append((f"from {node.module}", node.lineno))
        elif isinstance(node, ast.Call):
            name = _name(node.func, aliases).removeprefix("builtins.")
            if name in _CALLS or name.rpartition(".")[2] in _METHODS:
                found.append((name, node.lineno))
            if name == "torch.load" and _given(node, "weights_only") is not True:
                found.append(("torch.load without weights_only=True", node.lineno))
            if name.rpartition(".")[2] == "load" and _given(node, "allow_pickle") not in (None, False):
                found.append(("load with allow_pickle", node.lineno))
            if _given(node, "shell") not in (None, False):
                found.append(("a shell", node.lineno))
    return found


def test_no_room_unpickles_or_evaluates():
    files = [file for file in list_files(ROOT) if file.relative_to(ROOT).parts[0] not in FREE]
    assert len(files) > 60
    unsafe = [
        (file.relative_to(ROOT).as_posix(), what, line)
        for file in files
        for what, line in find_unsafe(file.read_text())
    ]
    assert [(file, what) for file, what, _ in unsafe] == list(ALLOWED), unsafe


def test_planted_calls_are_found_and_what_is_right_passes():
    unsafe = [
        "import pickle", "from pickle import loads", "torch.load(p)", "torch.load(p, weights_only=flag)",
        "np.load(p, allow_pickle=True)", "yaml.load(t, yaml.Loader)", "eval(t)", "subprocess.run(c, shell=True)",
        "archive.extractall(p)", "def f():\n    if x:\n        return eval(t)", "from torch import load\nload(p)",
        "import torch as t\nt.load(p)", "from os import system\nsystem(c)",
    ]  # fmt: skip
    assert [source for source in unsafe if len(find_unsafe(source)) != 1] == []
    right = ["task.eval()", "torch.load(p, weights_only=True)", "np.load(p)", "torch.compile(m)",
             "from json import load\nload(f)"]  # fmt: skip
    assert [source for source in right if find_unsafe(source)] == []
