"""README and docs/: every key exists, every link leads somewhere. slow_readme.py: every command."""

import re
import shlex

import pytest

from tests.in_process import SCRIPTS as COMMAND_NAMES
from tests.in_process import load_command
from tests.support import ROOT
from utils.config.schema import walk_keys

PAGES = [ROOT / "README.md"]
PAGES += [ROOT / f"docs/{name}.md" for name in ("wrong_labels", "another_machine", "commands", "comfyui")]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
# Blocks, and the first code of a table's second cell.
_CODE = re.compile(r"^```bash\n(.*?)^```|^\|[^|]+\| `(python [^`]+)`", re.DOTALL | re.MULTILINE)
_TEXTS = [match[1] or match[2] for match in _CODE.finditer(TEXT)]
_LINES = [line.partition("#")[0].strip() for text in _TEXTS for line in text.splitlines()]
COMMANDS = [line for line in _LINES if line]
SCRIPTS = ["submit/slurm" if name == "slurm" else name for name in COMMAND_NAMES]
NOT_KEYS = re.compile(r"\.(py|yaml|toml|jsonl?|csv|txt|html|parquet|safetensors|png|md|onnx)$|^task\.(origin|column)$")


def test_the_readme_has_the_commands_that_are_tested_below():
    scripts = {shlex.split(line)[1] for line in COMMANDS if line.startswith("python ")}
    assert scripts == {f"{name}.py" for name in SCRIPTS}
    # make accepts a phony target without a rule, too: it has nothing to do then.
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert targets == set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split())
    assert all(re.search(rf"^{target}:( .+|\n\t)", makefile, flags=re.MULTILINE) for target in targets)


def test_the_files_for_clouds_run_a_command_of_the_readme():
    for page in (PAGES[0], *ROOT.glob("submit/*.y*ml")):
        assert "train.py data.root=PATH loop.minutes=10 run_dir=outputs/mine" in page.read_text().replace(
            "$IMAGES", "PATH"
        )


DOCS = sorted((ROOT / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", [PAGES[0], *DOCS], ids=lambda page: page.name)


@every_page
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_index_names_every_page():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "docs/README.md").read_text("utf-8"))
    assert [page.name for page in DOCS if page.name not in {*links, "README.md"}] == []


@every_page
def test_every_key_exists(page):
    """Words in code, such as `loop.total_steps=0`, that begin with a key or group."""
    keys = {key for script in COMMAND_NAMES for key, _ in walk_keys(load_command(script).schema)}
    roots = {key.partition(".")[0] for key in keys}
    for code in re.findall(r"`([^`\n]+)`", page.read_text("utf-8")):
        for key in re.findall(r"(?:^|\s)([a-z_]+(?:\.[a-z_0-9]+)+)(?==|\s|$)", code):
            if key.partition(".")[0] in roots and not NOT_KEYS.search(key):
                assert key in keys, f"`{code}`"
