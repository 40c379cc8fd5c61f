"""Follow a page of docs/ as a newcomer does: its commands, in their order, on a folder as it is."""

import re
import shlex

from tests.in_process import run
from tests.support import ROOT


def list_commands(page):
    """Return the words of each Python command in the code blocks of a page: script and arguments."""
    text = (ROOT / "docs" / page).read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["python"]]


def follow(page, folder, words, short):
    """Run the commands of a page in `folder`; returns the line of result of each.

    words: what stands for names in capitals, such as PATH. short: what each script gets on top, so that it ends in
    seconds, in place of the keys that it gives.
    """
    results = []
    for script, *given in list_commands(page):
        if script == "view.py":  # it would not end; tests/viewer runs it
            continue
        arguments = [re.sub(r"\b[A-Z_]+\b", lambda match: words.get(match[0], match[0]), word) for word in given]
        own = short.get(script, ())
        keys = {word.partition("=")[0] for word in own}
        kept = [word for word in arguments if word.partition("=")[0] not in keys]
        results.append(run(script.removesuffix(".py"), [*kept, *own], folder))
    return results
