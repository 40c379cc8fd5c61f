"""README and docs/commands.md: every command runs (slow_readme.py), every link leads somewhere."""

import re
import shlex

import pytest

from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "docs/commands.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
MAKE = {
    "install", "install-sdxl", "install-cloud", "install-interop", "demo", "demo-full", "demo-tagger",
    "demo-sdxl", "test", "test-slow", "test-slurm", "lint", "bench", "bench-gpu", "simd", "clean",
}  # fmt: skip


def test_the_readme_has_the_commands_that_are_tested_below():
    scripts = {shlex.split(line)[1] for line in COMMANDS if line.startswith("python ")}
    root_scripts = ("prepare", "train", "pretrain_fcmae", "finetune", "finetune_sdxl", "evaluate", "export", "predict")
    assert scripts == {f"{name}.py" for name in (*root_scripts, "submit/slurm")}
    assert {line.split()[1] for line in COMMANDS if line.startswith("make ")} == MAKE


@pytest.mark.parametrize("target", sorted(MAKE))
def test_every_make_target_is_there(target):
    """make accepts a phony target without a rule, too: it has nothing to do then."""
    assert re.search(rf"^{target}:( .+|\n\t)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", [PAGES[0], *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
